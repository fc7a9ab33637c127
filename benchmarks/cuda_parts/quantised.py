"""int4 weights: the graph against torch on the dequantised weights, and its speed and memory against fp16."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import loopexport
from loopexport.choices import OnnxDtype

from .bases import TINY_SPAN, TINY_STEPS, random_base, tiny_base
from .results import Result, attempt, attempt_all, measured, skipped
from .scale import Scale
from .speed import STEPS, evaluations, graphs, middle


def int4(scale: Scale) -> Iterator[Result]:
    """Exactness on a tiny model, then speed on a large one; skipped where graphs have no int4."""
    if "int4" not in get_args(OnnxDtype):
        yield {"case": "int4", **skipped("this version writes no int4 graphs")}
        return
    with tempfile.TemporaryDirectory() as work:
        yield attempt("equals torch on the dequantised weights", lambda: _exact(Path(work), scale))
        yield from attempt_all("Qwen3-4B", lambda: _speed(Path(work), scale))


def _exact(work: Path, scale: Scale) -> Result:
    """The export's own comparison; OnnxError if it fails."""
    base = tiny_base("qwen3", work / "tiny")
    spec = {"span": TINY_SPAN, "steps": TINY_STEPS, "weights": "hardlink"}
    root = loopexport.convert(str(base), work / "tiny-looped", **spec).root
    outcome = loopexport.onnx.export_onnx(root, dtype="int4", **_compute(scale))
    found = {check.name: check.difference for checks in outcome.checks.values() for check in checks}
    return {**measured(**found), "status": "passed" if outcome.written else "failed"}


def _speed(work: Path, scale: Scale) -> Iterator[Result]:
    model = random_base("Qwen3-4B", scale.device, "fp16", scale.real)
    span, ratio = middle(model.config.num_hidden_layers), evaluations(model.config)
    model.save_pretrained(work / "base")
    del model
    root = loopexport.convert(str(work / "base"), work / "looped", span=span, steps=STEPS, weights="hardlink").root
    yield from graphs(root, ratio, scale, attention="gqa", dtype="int4", **_compute(scale))


def _compute(scale: Scale) -> dict[str, Any]:
    return {"compute": "fp16"} if scale.device == "cuda" else {}
