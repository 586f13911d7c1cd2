"""What MkDocs does not do by itself: see ``hooks`` in mkdocs.yml."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
LINKED = ("bench/results/*", "examples/*.*")

log = logging.getLogger("mkdocs.hooks")


def on_nav(nav: Any, config: Any, files: Files) -> None:
    """Makes files outside of docs/ that pages link to, results and examples, part of the site.

    A link like ``../bench/results/denoise.txt`` then leads somewhere in both places.
    """
    for pattern in LINKED:
        for path in sorted(ROOT.glob(pattern)):
            inside = path.relative_to(ROOT).as_posix()
            file = File.generated(config, f"../{inside}", abs_src_path=str(path))
            file.dest_uri = inside
            files.append(file)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> None:
    """Docstrings are Markdown: Sphinx's roles and directives would be shown as they stand."""
    for found in re.findall(r":[a-z]+:<code>.*?</code>|<p>\.\. \w+::", html):
        log.warning("%s shows %s", page.file.src_uri, found)
