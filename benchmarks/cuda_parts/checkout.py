"""Import loopexport from this checkout, installed or not."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def use_checkout() -> None:
    """Import loopexport from here, and its templates, which lie beside the package and not in it."""
    sys.path.insert(0, str(ROOT))
    import loopexport

    name, folder = "loopexport.templates", ROOT / "templates"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    loopexport.__dict__["templates"] = module
