"""Copies of a traced layer are what tracing the layer itself gives, and a layer that is no copy is not copied."""

from __future__ import annotations

import pytest

import loopexport
from loopexport.onnx import build
from loopexport.onnx.trace import layer_kinds, tracer
from loopexport.onnx.trace.repeat import NotRepeatableError, Repeats
from support.tiny import save_tiny, tiny_model

GPT2_BY_INDEX = {"scale_attn_by_inverse_layer_idx": True}
FEW_LAYERS = {
    "llama": {"num_hidden_layers": 3},
    "gpt2": {"num_hidden_layers": 3, "n_layer": 3},
    "gpt_oss": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
}


@pytest.fixture
def export(tmp_path):
    """`export(family, **overrides)`: a tiny export with few layers, enough for copies and for what is none."""

    def make(family, **overrides):
        base = save_tiny(family, tmp_path / family, **FEW_LAYERS[family], **overrides)
        return loopexport.convert(str(base), tmp_path / f"{family}-looped", span=(1, 2), steps=2)

    return make


@pytest.fixture
def whole(monkeypatch):
    """A function that traces every layer of an export."""

    def make(export):
        with monkeypatch.context() as patch:
            patch.setattr(tracer, "Repeats", lambda model, layers: Repeats(model, ()))
            return build.trace_export(export, "fp32")[1]

    return make


@pytest.fixture
def refusals(monkeypatch):
    """Reasons for which a model was traced whole after all."""
    told: list[str] = []
    monkeypatch.setattr(NotRepeatableError, "__init__", lambda self, reason: told.append(reason))
    return told


def as_data(graph):
    """A graph without the names that the order of tracing gives: what each node does to the results of which others."""
    known = {value: value.name for value in (*graph.inputs, *graph.outputs)}
    rows = []
    for number, node in enumerate(graph):
        for position, value in enumerate(node.outputs):
            known.setdefault(value, (number, position))
        rows.append(
            (node.op_type, [_told(value, known) for value in node.inputs], sorted(map(str, node.attributes.values())))
        )
    return rows


def _told(value, known):
    if value is not None and value.const_value is not None:
        return value.const_value.numpy().tolist()
    return known.get(value)


@pytest.mark.matrix
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_copies_of_a_layer_are_what_tracing_each_gives(export, whole, refusals, family):
    made = export(family)
    copied, traced = build.trace_export(made, "fp32")[1], whole(made)
    assert not refusals
    assert as_data(copied.model.graph) == as_data(traced.model.graph)
    assert {value.name for value in copied.model.graph.inputs} == {value.name for value in traced.model.graph.inputs}


@pytest.mark.parametrize(
    ("family", "overrides", "copied"),
    [
        ("llama", {}, [1, 2, 3, 4]),
        ("gpt_oss", {}, [2, 3]),  # every other layer has a sliding window
        ("gpt2", GPT2_BY_INDEX, []),
    ],
)
def test_only_layers_that_differ_in_weights_alone_are_copied(family, overrides, copied):
    model = tiny_model(family, **overrides)
    layers = model.transformer.h if family == "gpt2" else model.model.layers
    assert Repeats(model, list(layers)).copies == copied


@pytest.mark.matrix
def test_layer_taken_for_a_copy_by_mistake_is_found_by_the_control(export, whole, refusals, monkeypatch):
    monkeypatch.setattr(layer_kinds, "_signature", lambda module, index: ())
    made = export("gpt2", **GPT2_BY_INDEX)
    copied = build.trace_export(made, "fp32")[1]
    assert any("differs from" in reason for reason in refusals)
    assert as_data(copied.model.graph) == as_data(whole(made).model.graph)


@pytest.mark.matrix
def test_layer_called_with_another_mask_is_no_copy(export, refusals, monkeypatch):
    monkeypatch.setattr(layer_kinds, "_signature", lambda module, index: ())
    build.trace_export(export("gpt_oss"), "fp32")
    assert any("is called with other arguments than" in reason for reason in refusals)
