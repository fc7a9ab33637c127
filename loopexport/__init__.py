"""LoopExport: turn a frozen causal language model into a looped one, without training.

The public names load on first use, so that importing the package costs nothing. No submodule has the name of one of
them, or importing it would hide the name.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from loopexport._version import __version__

if TYPE_CHECKING:
    from loopexport.checks.verification import verify
    from loopexport.errors import LoopExportError
    from loopexport.export.conversion import ConvertPlan, convert, plan_convert
    from loopexport.export.directory import Export, open_export
    from loopexport.export.restoration import restore
    from loopexport.hub.publication import PushPlan, PushResult, plan_push, push
    from loopexport.loop.spec import LoopSpec

_HOMES = {
    "ConvertPlan": "export.conversion",
    "Export": "export.directory",
    "LoopExportError": "errors",
    "LoopSpec": "loop.spec",
    "PushPlan": "hub.publication",
    "PushResult": "hub.publication",
    "convert": "export.conversion",
    "open_export": "export.directory",
    "plan_convert": "export.conversion",
    "plan_push": "hub.publication",
    "push": "hub.publication",
    "restore": "export.restoration",
    "verify": "checks.verification",
}
__all__ = [
    "ConvertPlan",
    "Export",
    "LoopExportError",
    "LoopSpec",
    "PushPlan",
    "PushResult",
    "__version__",
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
