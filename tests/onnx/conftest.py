"""Traces and graphs of tiny exports, each trace made once a session. Without what ONNX needs, nothing here is run."""

from __future__ import annotations

import shutil
from importlib.util import find_spec

import pytest
import transformers

import loopexport

HAS_ONNX = all(find_spec(name) for name in ("onnxruntime", "onnxscript", "onnx_ir"))
if not HAS_ONNX or int(transformers.__version__.split(".")[0]) < 5:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)  # before any test replaces `trace_export`
def traced(export_dir):
    """`traced(family)`: skeleton and trace of a family's tiny base."""
    from loopexport.onnx import build

    made, trace_export = {}, build.trace_export

    def make(family, dtype="fp32", attention="portable"):
        key = family, dtype, attention
        if key not in made:
            made[key] = trace_export(loopexport.open_export(export_dir(family)), dtype, attention)
        return made[key]

    return make


@pytest.fixture
def graph(export_dir, traced, tmp_path):
    """`graph(family, **spec)`: a copy of an export with its graph in it."""
    import onnx_ir as ir

    from loopexport.onnx import build, plan_onnx

    def make(family="llama", attention="portable", **spec):
        root = tmp_path / "-".join(map(str, (family, attention, *spec.values())))
        shutil.copytree(export_dir(family, **spec), root)
        plan = plan_onnx(root, attention=attention)
        traces = traced(family, attention=attention)
        model = build.build_graph(plan, plan.export, *traces, plan.export.spec, {})
        ir.save(model, root / "model.onnx")
        return root

    return make
