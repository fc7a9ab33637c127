"""ONNX: an export unrolled into a graph that ONNX Runtime runs from the export's own weight files."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .exporting import apply, export_onnx
    from .planning import OnnxPlan, plan_onnx
    from .run import OnnxModel

_HOMES = {
    "OnnxModel": "run",
    "OnnxPlan": "planning",
    "apply": "exporting",
    "export_onnx": "exporting",
    "plan_onnx": "planning",
}
__all__ = ["OnnxModel", "OnnxPlan", "apply", "export_onnx", "plan_onnx"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
