"""ONNX: unroll an export into a graph that ONNX Runtime runs from the export's own weight files."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .build import OnnxOutcome, export_onnx
    from .plan import OnnxPlan, plan_onnx
    from .runtime.model import OnnxModel
    from .runtime.sampling import Sampling

_HOMES = {
    "OnnxModel": "runtime.model",
    "OnnxOutcome": "build",
    "OnnxPlan": "plan",
    "Sampling": "runtime.sampling",
    "export_onnx": "build",
    "plan_onnx": "plan",
}
__all__ = ["OnnxModel", "OnnxOutcome", "OnnxPlan", "Sampling", "export_onnx", "plan_onnx"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
