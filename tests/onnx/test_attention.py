"""Fused attention equals torch, or is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

import loopexport
import loopexport.onnx
from loopexport.onnx import OnnxModel, build, requirements
from support.onnx_graphs import BEYOND_FUSED, LOOPS, MORE_LOOPS, assert_equals_torch
from support.structure import by_class
from support.tiny import FAMILIES


@pytest.mark.parametrize("family", by_class(sorted(FAMILIES.keys() - BEYOND_FUSED.keys()), ("llama",)))
def test_fused_attention_equals_torch(graph, family):
    """GroupQueryAttention: iterations under `shared` read the natural cache and add no key to it."""
    assert_fused_equals_torch(graph, family, LOOPS)


@pytest.mark.parametrize("family", by_class(("llama", "gemma3_text"), ("llama",)))
def test_fused_attention_equals_torch_in_more_loops(graph, family):
    assert_fused_equals_torch(graph, family, MORE_LOOPS[:2])


def assert_fused_equals_torch(graph, family, loops):
    for spec in loops:
        root = graph(family, "gqa", **spec)
        assert_equals_torch(root, padded=False)
        fused = [node for node in ir.load(root / "model.onnx").graph if node.op_type == "GroupQueryAttention"]
        assert len(fused) == 6 + (spec["steps"] - 1) * 3


def test_fused_attention_refuses_what_it_would_get_wrong(graph):
    model = OnnxModel(graph("llama", "gqa", steps=3))
    ids = np.array([[5, 6, 7], [8, 9, 10]])
    with pytest.raises(loopexport.LoopExportError, match="takes no padded batch"):
        model.forward(ids, np.array([[0, 1, 1], [1, 1, 1]]))
    _, cache = model.forward(ids)
    with pytest.raises(loopexport.LoopExportError, match="takes 3 tokens for a single prompt only"):
        model.forward(ids, cache=cache)


@pytest.mark.parametrize(
    ("options", "oldest", "refused_on"),
    [
        ({"attention": "portable"}, "1.23.1", "1.23.0"),
        ({"attention": "gqa"}, "1.31", "1.30.0"),
        ({"attention": "gqa", "kv": "per_step"}, "1.23.1", "1.23.0"),
        ({"attention": "gqa", "kv": "reference"}, "1.23.1", "1.23.0"),
        ({"attention": "gqa", "steps": 1}, "1.23.1", "1.23.0"),
    ],
    ids=str,
)
def test_graphs_say_which_onnxruntime_they_need(graph, monkeypatch, options, oldest, refused_on):
    """Older ones refuse GroupQueryAttention that adds no key, crash in it, or compute something else."""
    root = graph(**options)
    assert ir.load(root / "model.onnx").metadata_props["min_onnxruntime"] == oldest
    attention = options["attention"]
    said = [each for each in loopexport.onnx.plan_onnx(root, attention=attention).warnings if oldest in each]
    assert len(said) == (oldest == "1.31")
    real = requirements.version
    monkeypatch.setattr(requirements, "version", lambda name: refused_on if name == "onnxruntime" else real(name))
    with pytest.raises(loopexport.LoopExportError, match=f"install {oldest} or newer"):
        loopexport.onnx.plan_onnx(root, attention=attention)


@pytest.mark.parametrize(("kv", "oldest"), [("shared", "1.31"), ("per_step", "1.25")])
def test_graphs_with_several_needs_name_the_newest_onnxruntime(export_dir, traced, kv, oldest):
    """`QMoE` needs 1.25."""
    plan = loopexport.onnx.plan_onnx(export_dir("llama", kv=kv), attention="gqa")
    plan = replace(plan, whole_experts=True)
    model = build.build_graph(plan, plan.export, *traced("llama", attention="gqa"), plan.export.spec, {})
    assert model.metadata_props["min_onnxruntime"] == oldest


@pytest.mark.parametrize(("family", "says"), BEYOND_FUSED.items())
def test_families_beyond_fused_attention_are_refused(export_dir, family, says):
    with pytest.raises(loopexport.LoopExportError, match=says):
        build.trace_export(loopexport.open_export(export_dir(family)), "fp32", "gqa")
