"""Fixtures: traces and graphs of tiny exports, each trace made once per session.

Without the packages of the onnx extra, or on transformers 4, pytest collects no test of this folder.
"""

from __future__ import annotations

import copy
import shutil
from functools import lru_cache
from importlib.util import find_spec

import pytest
import transformers

import loopexport
from support.made_onnx import VOCAB
from support.small_tokenizer import write_tokenizer
from support.tiny import SPAN, save_tiny

HAS_ONNX = all(find_spec(name) for name in ("onnxruntime", "onnxscript", "onnx_ir"))
if not HAS_ONNX or int(transformers.__version__.split(".")[0]) < 5:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def one_registry():
    """Build torch.onnx's registry of operators once and copy it; torch builds it for each export."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    build = lru_cache(ONNXRegistry.from_torchlib)

    def copy_of_the_first(*options, **named):
        registry = copy.copy(build(*options, **named))
        registry.functions = {target: list(each) for target, each in registry.functions.items()}
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(copy_of_the_first))
        yield


@pytest.fixture(scope="session", autouse=True)  # before any test replaces `trace_export`
def traced(export_dir):
    """`traced(family)`: skeleton and trace of the family's tiny base."""
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
    """`graph(family, **spec)`: a copy of an export, with its graph as `model.onnx`."""
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


@pytest.fixture(scope="session")
def made_traces():
    """Traces of the base of `made`, by dtype and attention layout."""
    return {}


@pytest.fixture(scope="module")
def one_trace(made_traces):
    """Trace the base of `made` only once for each dtype and attention layout."""
    from loopexport.onnx import build

    real = build.trace_export

    def trace(export, *kind):
        if kind not in made_traces:
            made_traces[kind] = real(export, *kind)
        return made_traces[kind]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "trace_export", trace)
        yield


@pytest.fixture(scope="module")
def made(one_trace, tmp_path_factory):
    """An export with a tokenizer, `model.onnx` of its own K, 3, and `model_k2.onnx`."""
    import loopexport.onnx

    root = tmp_path_factory.mktemp("made")
    base = save_tiny("llama", root / "base", vocab_size=VOCAB)
    write_tokenizer(base, "PreTrainedTokenizerFast")
    out = loopexport.convert(str(base), root / "out", span=SPAN, steps=3, weights="copy").root
    loopexport.onnx.export_onnx(out, steps=(2, 3), verify=False)
    return out


@pytest.fixture
def export(made, tmp_path):
    """A copy of `made` that a test may change."""
    return shutil.copytree(made, tmp_path / "export")
