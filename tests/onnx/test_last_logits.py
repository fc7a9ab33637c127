"""The input `num_logits_to_keep`: logits of the last positions alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

import loopexport
from loopexport.onnx import OnnxModel
from loopexport.onnx.check.comparison import check_graph
from support.structure import by_class
from support.tiny import FAMILIES, VOCAB

TOKENS = np.random.default_rng(2).integers(5, VOCAB, size=(2, 7))


def run_session(root, **more):
    """The logits of `TOKENS`, as any runtime would get them."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(root / "model.onnx", options)
    feeds = {"input_ids": TOKENS, "attention_mask": np.ones_like(TOKENS), **more}
    for each in session.get_inputs():
        if each.name == "position_ids":
            feeds[each.name] = np.tile(np.arange(7), (2, 1))
        if each.name.startswith("past_key_values."):
            feeds[each.name] = np.zeros((2, each.shape[1], 0, each.shape[3]), np.float32)
    (optional,) = session.get_overridable_initializers()
    assert (optional.name, optional.shape, optional.type) == ("num_logits_to_keep", [], "tensor(int64)")
    return session.run(["logits"], feeds)[0]


@pytest.mark.parametrize("family", by_class(FAMILIES, ("llama", "gpt2")))
def test_last_logits_are_those_of_the_last_positions(graph, family):
    root = graph(family, steps=2, kv="per_step", decode="bypass")
    everything = run_session(root)
    assert everything.shape == (2, 7, VOCAB)
    scale = np.abs(everything).max()
    for number, rows in ((0, 7), (1, 1), (3, 3), (7, 7), (9, 7)):
        last = run_session(root, num_logits_to_keep=np.array(number))
        assert last.shape == (2, rows, VOCAB)
        assert np.abs(last - everything[:, -rows:]).max() <= 1e-6 * scale, number


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3", marks=pytest.mark.matrix)])
def test_head_runs_on_the_kept_positions_alone(graph, family):
    """A tied head, too."""
    nodes = list(ir.load(graph(family, steps=1) / "model.onnx").graph)
    (kept,) = [index for index, node in enumerate(nodes) if node.name == "num_logits_to_keep/rows"]
    assert {node.op_type for node in nodes[kept + 1 :]} & {"MatMul", "Gemm"}
    assert not {node.op_type for node in nodes[kept + 1 :]} & {"Attention", "RMSNormalization"}


def test_wrong_last_logits_fail_their_check(graph, monkeypatch):
    """The logits of all positions stay right."""
    forward = OnnxModel.forward

    def first_logits(self, *args, num_logits=None):
        logits, cache = forward(self, *args)
        return logits[:, :num_logits], cache

    monkeypatch.setattr(OnnxModel, "forward", first_logits)
    root = graph("llama", steps=2)
    checks = check_graph(root, root / "model.onnx", loopexport.open_export(root).spec, "fp32")
    assert [check.name for check in checks if not check.passed] == ["the last logits alone equal torch"]
