"""LoopExport: turn a frozen causal language model into a looped one, without training.

The public names load on first use, so that importing the package costs nothing. No submodule has the name of one of
them, or importing it would hide the name.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .conversion import ConvertPlan, convert, plan_convert
    from .errors import LoopExportError
    from .export import Export, open_export
    from .publication import PushPlan, PushResult, plan_push, push
    from .restoration import restore
    from .spec import LoopSpec
    from .verification import verify

__version__ = "0.1.0"

_HOMES = {
    "ConvertPlan": "conversion",
    "Export": "export",
    "LoopExportError": "errors",
    "LoopSpec": "spec",
    "PushPlan": "publication",
    "PushResult": "publication",
    "convert": "conversion",
    "open_export": "export",
    "plan_convert": "conversion",
    "plan_push": "publication",
    "push": "publication",
    "restore": "restoration",
    "verify": "verification",
}
__all__ = [
    "ConvertPlan",
    "Export",
    "LoopExportError",
    "LoopSpec",
    "PushPlan",
    "PushResult",
    "convert",
    "open_export",
    "plan_convert",
    "plan_push",
    "push",
    "restore",
    "verify",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
