"""The ONNX parts of `benchmarks/cuda.py`, rehearsed on the CPU: a thin slice, and that damage makes it fail."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import loopexport
from loopexport.onnx import OnnxModel
from support.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def parts_on_path(monkeypatch):
    """Let tests import `cuda_parts`; for no longer, because there `cuda.py` hides packages of that name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture(autouse=True, scope="module")
def traced_once():
    """One trace for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        from cuda_parts.onnx_exactness import one_trace

        with one_trace():
            yield


@pytest.mark.parametrize(("damage", "status"), [(None, "passed"), ("natural_k", "failed")])
def test_shared_read_is_as_exact_as_the_natural_pass(monkeypatch, damage, status):
    from cuda_parts import onnx_shared_read
    from cuda_parts.scale import REHEARSAL

    make_graph = onnx_shared_read.make_graph

    def damaged(*options):
        model = make_graph(*options)
        node = model.graph.node[-5]
        assert node.op_type == "GroupQueryAttention"
        if damage:
            node.input[4] = damage
        return model

    monkeypatch.setattr(onnx_shared_read, "make_graph", damaged)
    results = list(itertools.islice(onnx_shared_read.shared_reads(REHEARSAL), 4))
    assert {each["status"] for each in results} == {status}, results


def test_graph_is_as_exact_as_torch_and_a_wrong_one_fails(monkeypatch):
    from cuda_parts import onnx_exactness
    from cuda_parts.scale import REHEARSAL

    written, write_graph, graph_logits = [], onnx_exactness.write_graph, onnx_exactness.graph_logits

    def write_once(*options):
        written[:] = written or [write_graph(*options)]
        return written[0]

    def run():
        (result,) = onnx_exactness.exact_as_torch(REHEARSAL, (("qwen3", "gqa"),), ("shared",))
        return result

    monkeypatch.setattr(onnx_exactness, "write_graph", write_once)
    result = run()
    assert result["status"] == "passed", result
    assert result["torch"] > 0
    monkeypatch.setattr(onnx_exactness, "graph_logits", lambda *options: 1.1 * graph_logits(*options))
    assert run()["status"] == "failed"


def test_graphs_of_two_loops_are_timed_and_their_nodes_counted(tmp_path):
    from cuda_parts.bases import TINY_SPAN, tiny_base
    from cuda_parts.scale import REHEARSAL
    from cuda_parts.sessions import nodes_by_provider
    from cuda_parts.speed import STEPS, graphs

    base = tiny_base("qwen3", tmp_path / "base")
    root = loopexport.convert(str(base), tmp_path / "out", span=TINY_SPAN, steps=STEPS, weights="hardlink").root
    *_, last = results = list(graphs(root, 3.5, REHEARSAL, dtype="fp16", attention="gqa"))
    assert [each["status"] for each in results] == ["measured"] * 4, results
    assert last["token_after_8_overhead"] > 0
    model = OnnxModel(root, "model_fp16_gqa.onnx", provider="cpu")
    counts = nodes_by_provider(model, np.array([[3, 4, 5]]))
    assert set(counts) == {"CPUExecutionProvider"}
    assert counts["CPUExecutionProvider"]["GroupQueryAttention"] == 6 + (STEPS - 1) * 3
