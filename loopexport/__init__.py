"""LoopExport: turn a frozen causal language model into a looped one, without training.

The public names load on first use, so that `import loopexport` is fast. No submodule may have the name of one of them,
because importing it would hide the name.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from loopexport._version import __version__

if TYPE_CHECKING:
    from loopexport.checks.code_proof import UpgradeResult, upgrade
    from loopexport.checks.verification import verify
    from loopexport.errors import (
        CheckpointError,
        EvaluationError,
        ExportError,
        HubError,
        KeywordError,
        LoopExportError,
        OnnxError,
        OnnxInputError,
        OutputError,
        PushError,
        SpecError,
    )
    from loopexport.evaluation.compare_result import CompareResult
    from loopexport.evaluation.comparison import ComparePlan, compare, plan_compare
    from loopexport.evaluation.scan_result import ScanResult
    from loopexport.evaluation.scan_run import ScanPlan
    from loopexport.evaluation.scanning import plan_scan, scan
    from loopexport.export.adoption import AdoptPlan, adopt, plan_adopt
    from loopexport.export.check import Check
    from loopexport.export.code_upgrade import UpgradePlan, plan_upgrade
    from loopexport.export.conversion import ConvertPlan, convert, plan_convert
    from loopexport.export.directory import Export, open_export
    from loopexport.export.mlx_plan import MlxPlan, plan_mlx
    from loopexport.export.restoration import restore
    from loopexport.hub.publication import PushPlan, PushResult, plan_push, push
    from loopexport.loop.spec import LoopSpec
    from loopexport.onnx.build import OnnxOutcome, export_onnx
    from loopexport.onnx.plan import OnnxPlan, plan_onnx
    from loopexport.onnx.runtime.model import OnnxModel
    from loopexport.onnx.runtime.sampling import Sampling

_HOMES = {
    "AdoptPlan": "export.adoption",
    "Check": "export.check",
    "CheckpointError": "errors",
    "ComparePlan": "evaluation.comparison",
    "CompareResult": "evaluation.compare_result",
    "ConvertPlan": "export.conversion",
    "EvaluationError": "errors",
    "Export": "export.directory",
    "ExportError": "errors",
    "HubError": "errors",
    "KeywordError": "errors",
    "LoopExportError": "errors",
    "LoopSpec": "loop.spec",
    "MlxPlan": "export.mlx_plan",
    "OnnxError": "errors",
    "OnnxInputError": "errors",
    "OnnxModel": "onnx.runtime.model",
    "OnnxOutcome": "onnx.build",
    "OnnxPlan": "onnx.plan",
    "OutputError": "errors",
    "PushError": "errors",
    "PushPlan": "hub.publication",
    "PushResult": "hub.publication",
    "Sampling": "onnx.runtime.sampling",
    "ScanPlan": "evaluation.scan_run",
    "ScanResult": "evaluation.scan_result",
    "SpecError": "errors",
    "UpgradePlan": "export.code_upgrade",
    "UpgradeResult": "checks.code_proof",
    "adopt": "export.adoption",
    "compare": "evaluation.comparison",
    "convert": "export.conversion",
    "export_onnx": "onnx.build",
    "open_export": "export.directory",
    "plan_adopt": "export.adoption",
    "plan_compare": "evaluation.comparison",
    "plan_convert": "export.conversion",
    "plan_mlx": "export.mlx_plan",
    "plan_onnx": "onnx.plan",
    "plan_push": "hub.publication",
    "plan_scan": "evaluation.scanning",
    "plan_upgrade": "export.code_upgrade",
    "push": "hub.publication",
    "restore": "export.restoration",
    "scan": "evaluation.scanning",
    "upgrade": "checks.code_proof",
    "verify": "checks.verification",
}
__all__ = [
    "AdoptPlan",
    "Check",
    "CheckpointError",
    "ComparePlan",
    "CompareResult",
    "ConvertPlan",
    "EvaluationError",
    "Export",
    "ExportError",
    "HubError",
    "KeywordError",
    "LoopExportError",
    "LoopSpec",
    "MlxPlan",
    "OnnxError",
    "OnnxInputError",
    "OnnxModel",
    "OnnxOutcome",
    "OnnxPlan",
    "OutputError",
    "PushError",
    "PushPlan",
    "PushResult",
    "Sampling",
    "ScanPlan",
    "ScanResult",
    "SpecError",
    "UpgradePlan",
    "UpgradeResult",
    "__version__",
    "adopt",
    "compare",
    "convert",
    "export_onnx",
    "open_export",
    "plan_adopt",
    "plan_compare",
    "plan_convert",
    "plan_mlx",
    "plan_onnx",
    "plan_push",
    "plan_scan",
    "plan_upgrade",
    "push",
    "restore",
    "scan",
    "upgrade",
    "verify",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
