"""Draws ``docs/images/tie.svg``: which numbers of a tied weight are held, and where each is used.

    python docs/draw_tie.py

The weight is that of 3 channels and a 3x3 kernel. It is drawn twice, kernel by kernel and tap by
tap; the numbers of one tap, 1 to 9, can be found in both. Colours follow the reader's light or
dark scheme.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

CHANNELS = TAPS_PER_SIDE = 3
TAPS = TAPS_PER_SIDE**2
CELL, GAP = 33, 13  # pixels: a number, and the space between two blocks of them
BLOCK = 3 * CELL + GAP
SIDE = 3 * BLOCK - GAP
WIDTH, HEIGHT = 920, 676
LEFT, RIGHT, TOP = 78, 508, 158
STRIP_TOP, STRIP_CELL = 594, 16

STYLE = """
  .card { fill: #fbfaf7; stroke: #dedbd2 }
  text { font-family: system-ui, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif; fill: #25302f }
  .formula { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 21px }
  .title { font-size: 17px; font-weight: 600 }
  .note { font-size: 14px; fill: #5d6a69 }
  .number { font-size: 15px; font-weight: 600; text-anchor: middle }
  .middle { text-anchor: middle }
  .held { fill: #2a9187 }
  .other { fill: #d9e6e2 }
  .tile { fill: #e8833a }
  .tile-other { fill: #fae0c8 }
  text.on-tile { fill: #ffffff }
  text.on-tile-other { fill: #a4500f }
  .line { fill: none; stroke: #a4500f; stroke-width: 2 }
  @media (prefers-color-scheme: dark) {
    .card { fill: #1b2221; stroke: #36423f }
    text { fill: #e6ecea }
    .note { fill: #a3b1ae }
    .held { fill: #2fa498 }
    .other { fill: #32463f }
    .tile { fill: #d9762f }
    .tile-other { fill: #50351f }
    text.on-tile-other { fill: #f5b683 }
    .line { stroke: #f0a468 }
  }
"""


def main() -> None:
    path = Path(__file__).parent / "images" / "tie.svg"
    path.parent.mkdir(exist_ok=True)
    path.write_text(drawing())


def drawing() -> str:
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="A tied weight of 3 channels and 3x3 kernels: 42 of its 81 numbers are held">',
        f"<style>{STYLE}</style>",
        f'<rect class="card" x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="16"/>',
        text(WIDTH / 2, 46, "W[i, j, a, b]  =  W[j, i, 2-a, 2-b]", "formula middle"),
        text(
            WIDTH / 2,
            74,
            "swap the two channels, flip the kernel: the same number (or minus it)",
            "note middle",
        ),
        *kernel_by_kernel(),
        *tap_by_tap(),
        *held_numbers(),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def kernel_by_kernel() -> Iterator[str]:
    """Nine kernels: those of one output channel in a row."""
    yield text(LEFT + SIDE / 2, TOP - 32, "kernel by kernel", "title middle")
    yield text(LEFT + SIDE / 2, TOP - 12, "input channel j →", "note middle")
    x, y = LEFT - 16, TOP + SIDE / 2
    yield text(x, y, "← output channel i", "note middle", f"rotate(-90 {x} {y})")
    yield from cells(lambda i, j, a, b: place(LEFT, i, j, a, b))
    for row, column in ((0, CHANNELS - 1), (CHANNELS - 1, 0)):
        yield outline(*place(LEFT, row, column))
    yield caption(LEFT, "each of the two outlined kernels is the other,", "rotated by 180°")


def tap_by_tap() -> Iterator[str]:
    """Nine matrices of channels, each of one place in the kernels."""
    yield text(RIGHT + SIDE / 2, TOP - 32, "the same numbers, tap by tap", "title middle")
    yield text(RIGHT + SIDE / 2, TOP - 12, "kernel column b →", "note middle")
    x, y = RIGHT - 16, TOP + SIDE / 2
    yield text(x, y, "← kernel row a", "note middle", f"rotate(-90 {x} {y})")
    yield from cells(lambda i, j, a, b: place(RIGHT, a, b, i, j))
    yield caption(RIGHT, "one tile of numbers, used twice:", "as it stands, and transposed")


def held_numbers() -> Iterator[str]:
    """The packed vector, number by number."""
    tiles = [t * CHANNELS**2 for t in range(TAPS // 2 + 1)]
    count = tiles[-1] + CHANNELS * (CHANNELS + 1) // 2
    gap = 7
    start = (WIDTH - count * STRIP_CELL - (len(tiles) - 1) * gap) / 2
    yield text(
        WIDTH / 2,
        STRIP_TOP - 16,
        f"what the layer holds and trains: {count} numbers instead of {CHANNELS**2 * TAPS}",
        "title middle",
    )
    for n in range(count):
        x = start + n * STRIP_CELL + gap * min(n // CHANNELS**2, len(tiles) - 1)
        in_tile = n < CHANNELS**2
        yield square(x, STRIP_TOP, STRIP_CELL, "tile" if in_tile else "held")
    below = STRIP_TOP + 44
    yield square(WIDTH / 2 - 262, below - 13, STRIP_CELL, "held")
    yield text(WIDTH / 2 - 240, below, "held: four taps and half of the centre", "note")
    yield square(WIDTH / 2 + 26, below - 13, STRIP_CELL, "other")
    yield text(WIDTH / 2 + 48, below, "the same numbers, in their other place", "note")


def cells(at: Callable[[int, int, int, int], tuple[float, float]]) -> Iterator[str]:
    """Each number of the weight where ``at`` puts it."""
    channels, sides = range(CHANNELS), range(TAPS_PER_SIDE)
    for i, j, a, b in itertools.product(channels, channels, sides, sides):
        x, y = at(i, j, a, b)
        tap = a * TAPS_PER_SIDE + b
        held = tap < TAPS // 2 or (tap == TAPS // 2 and i >= j)
        if tap in (0, TAPS - 1):
            kind = "tile" if held else "tile-other"
            number = CHANNELS * i + j + 1 if held else CHANNELS * j + i + 1
            yield square(x, y, CELL, kind)
            yield text(x + CELL / 2, y + CELL / 2 + 5.5, str(number), f"number on-{kind}")
        else:
            yield square(x, y, CELL, "held" if held else "other")


def place(
    left: float, row: int, column: int, inner_row: int = 0, inner_column: int = 0
) -> tuple[float, float]:
    return left + column * BLOCK + inner_column * CELL, TOP + row * BLOCK + inner_row * CELL


def caption(left: float, *lines: str) -> str:
    middle, top = left + SIDE / 2, TOP + SIDE + 26
    return "\n".join(
        text(middle, top + 19 * n, line, "note middle") for n, line in enumerate(lines)
    )


def outline(x: float, y: float) -> str:
    side = 3 * CELL + 6
    return f'<rect class="line" x="{x - 3}" y="{y - 3}" width="{side}" height="{side}" rx="7"/>'


def square(x: float, y: float, side: float, kind: str) -> str:
    return (
        f'<rect class="{kind}" x="{x + 1:g}" y="{y + 1:g}" width="{side - 2:g}" '
        f'height="{side - 2:g}" rx="{side / 8:g}"/>'
    )


def text(x: float, y: float, words: str, kind: str, transform: str = "") -> str:
    turned = f' transform="{transform}"' if transform else ""
    return f'<text class="{kind}" x="{x:g}" y="{y:g}"{turned}>{words}</text>'


if __name__ == "__main__":
    main()
