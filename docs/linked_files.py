"""Files of the repository that pages link to, such as results and examples, as part of the site.

A link like ``../bench/results/denoise.txt`` then works both in the folder and on the site.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
LINKED = ("bench/results/*", "examples/*.*", "LICENSE")


def on_nav(nav: Any, config: Any, files: Files) -> None:
    for pattern in LINKED:
        for path in sorted(ROOT.glob(pattern)):
            inside = path.relative_to(ROOT).as_posix()
            file = File.generated(config, f"../{inside}", abs_src_path=str(path))
            file.dest_uri = inside
            files.append(file)
