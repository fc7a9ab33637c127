"""Draw all pictures, light and dark.

    python docs/pictures/draw.py [--check]

Writes `docs/pictures/NAME-light.svg` and `NAME-dark.svg`. With --check it writes nothing, and fails if a checked-in
file is not what the scripts draw.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from drawing import THEMES

HERE = Path(__file__).parent
NAMES = ("loop", "cost", "gains", "runtimes", "terminal")


def pictures() -> dict[Path, str]:
    """The SVG text of every picture, by file."""
    return {HERE / f"{name}-{theme.name}.svg": import_module(name).draw(theme) for name in NAMES for theme in THEMES}


def main() -> None:
    """Write the pictures, or compare them."""
    if "--check" not in sys.argv[1:]:
        for path, text in pictures().items():
            path.write_text(text, encoding="utf-8")
        return
    stale = [path.name for path, text in pictures().items() if not path.exists() or path.read_text("utf-8") != text]
    if stale:
        sys.exit(f"not what the scripts draw: {', '.join(stale)}; run `make pictures`")


if __name__ == "__main__":
    main()
