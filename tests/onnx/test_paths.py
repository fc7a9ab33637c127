"""Graphs of paths, and of spans with steps of their own, against torch; layers that a path leaves out are not there."""

from __future__ import annotations

import json

import onnx
import pytest

import loopexport
from loopexport.onnx import OnnxModel
from loopexport.onnx.graph.genai import genai_config
from support.onnx_graphs import assert_equals_torch
from support.structure import by_class

OVERLAPPING = ((0, 4), (1, 5), (2, 6))
LEAVING_OUT = ((0, 2), (3, 5), (1, 2), (4, 5), (5, 6))  # a detour that does not end where it began; no layer 2
LOOPS = (
    {"path": OVERLAPPING},
    {"path": LEAVING_OUT},
    {"path": LEAVING_OUT, "kv": "shared"},
    {"path": OVERLAPPING, "kv": "reference"},
    {"path": OVERLAPPING, "decode": "bypass"},
    {"path": ((0, 1), (3, 4), (0, 1))},  # no layers 1 and 4, from whose slots the trace reads sizes
    {"span": ((0, 2), (3, 5)), "steps": (2, 3), "kv": "per_step"},
    {"span": ((0, 2), (3, 5)), "steps": (1, 3), "rule": "midpoint", "mode": "layer"},
)


@pytest.mark.parametrize("attention", ["portable", "gqa"])
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: ",".join(map(str, loop.values())))
def test_graph_equals_torch(graph, loop, attention):
    assert_equals_torch(graph("llama", attention, **loop), padded=attention == "portable")


@pytest.mark.parametrize("stop", [1, 4])
def test_a_path_that_ends_early_equals_torch(graph, stop):
    assert_equals_torch(graph("llama", path=((0, stop),), kv="shared"), padded=True)


@pytest.mark.parametrize("family", by_class(("gemma2", "qwen3_moe", "deepseek_v3"), ("gemma2",)))
def test_other_families_equal_torch(graph, family):
    for loop in LOOPS[:2]:
        assert_equals_torch(graph(family, **loop))


@pytest.mark.parametrize("attention", ["portable", "gqa"])
def test_a_left_out_layer_has_no_weights_and_no_cache_slot_in_the_graph(graph, traced, attention):
    root = graph("llama", attention, path=LEAVING_OUT)
    model = onnx.load(root / "model.onnx", load_external_data=False)
    assert not [each.name for each in model.graph.initializer if "layers.2." in each.name]
    assert [each.name for each in model.graph.initializer if "layers.3." in each.name]
    keys = [each.name for each in model.graph.input if each.name.endswith(".key")]
    slots = 5 + 2  # one of each visited layer, and one of each second visit
    assert keys == [f"past_key_values.{number}.key" for number in range(slots)]
    assert len(OnnxModel(root).slots.names) == 2 * slots
    export = loopexport.open_export(root)
    trace = traced("llama", attention=attention)[1].model.graph
    config = genai_config(export, "model.onnx", trace, export.spec, attention)
    assert config["model"]["decoder"]["num_hidden_layers"] == slots


def test_record_keeps_the_steps_of_each_span(tiny_base, tmp_path):
    root = loopexport.convert(str(tiny_base("llama")), tmp_path / "out", span=["0:2x2", "3:5x3"]).root
    loopexport.export_onnx(root, verify=False)
    record = json.loads((root / "loopexport.json").read_text())["onnx"]["model.onnx"]
    assert record["steps"] == [2, 3]
    assert "| 2 and 3 |" in (root / "README.md").read_text()
    assert not [check for check in loopexport.verify(root) if check.passed is False]
