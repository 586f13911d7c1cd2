"""What was decided for calls by the tables, and is forgotten when they are read anew."""

from __future__ import annotations

from typing import Any, TypeVar

from ..geometry import Geometry
from ..packing import Layout

_MAX_CHOICES = 4096  # calls that are told apart; images of ever new sizes must not fill the memory

_Choice = TypeVar("_Choice")
_choices: dict[tuple, object] = {}


class Known:
    """What is kept of calls of one description: what they compute, and how they are launched, once
    that is chosen."""

    choice: Any = None  # see :class:`.select.Choice`

    def __init__(self, layout: Layout, geometry: Geometry) -> None:
        self.layout, self.geometry = layout, geometry


def remembered(call: tuple) -> object | None:
    """The choice that was made for a call, or None."""
    return _choices.get(call)


def remember(call: tuple, choice: _Choice) -> _Choice:
    """Keeps a choice until the tables are read again."""
    if len(_choices) >= _MAX_CHOICES:
        _choices.clear()
    _choices[call] = choice
    return choice


def forget_all() -> None:
    """What the tables say may have changed."""
    _choices.clear()
