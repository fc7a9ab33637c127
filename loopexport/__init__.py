"""LoopExport: turn a frozen causal language model into a looped one, without training.

The public names load on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .convert import ConvertPlan, convert, plan_convert
    from .errors import LoopExportError
    from .export import Export, open_export
    from .restore import restore
    from .spec import LoopSpec
    from .verify import verify

__version__ = "0.1.0"

_HOMES = {
    "ConvertPlan": "convert",
    "Export": "export",
    "LoopExportError": "errors",
    "LoopSpec": "spec",
    "convert": "convert",
    "open_export": "export",
    "plan_convert": "convert",
    "restore": "restore",
    "verify": "verify",
}
__all__ = [
    "ConvertPlan",
    "Export",
    "LoopExportError",
    "LoopSpec",
    "convert",
    "open_export",
    "plan_convert",
    "restore",
    "verify",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value  # also replaces the submodule of the same name, which the import has just bound here
    return value
