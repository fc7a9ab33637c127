"""What is in a graph: stored bytes once, no product too many, readable names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

import loopexport
import loopexport.onnx
from loopexport.onnx import OnnxModel, build, plan_onnx
from loopexport.onnx.graph.bind_weights import stored_bytes
from support.tiny import SPAN, VOCAB


def test_weights_of_every_k_are_the_stored_bytes_once(export_dir, traced):
    """Tied and experts' weights included: no byte is written, and none is read twice."""
    for family in ("qwen3", "qwen3_moe"):
        plan = plan_onnx(export_dir(family))
        read = [
            stored_bytes(build.build_graph(plan, plan.export, *traced(family), spec, {}))
            for spec in (plan.export.spec, replace(plan.export.spec, steps=1), replace(plan.export.spec, steps=6))
        ]
        assert read[0] == read[1] == read[2]
        tensors = plan.export.base.tensors.values()
        assert sum(read[0].values()) == sum(each.nbytes for each in tensors)
        assert {start for _, start in read[0]} == {each.start for each in tensors}


def test_shared_iterations_project_no_keys(export_dir, traced):
    """Under `shared` a copy of a layer has two products less: those of its keys and of its values."""

    def products(**spec):
        plan = plan_onnx(export_dir("llama", **spec))
        model = build.build_graph(plan, plan.export, *traced("llama"), plan.export.spec, {})
        return sum(node.op_type == "MatMul" for node in model.graph)

    width, base = SPAN[1] - SPAN[0], products(steps=1)
    assert products(steps=3) - base == 2 * width * 5
    assert products(steps=3, kv="per_step") - base == 2 * width * 7


def test_tied_head_reads_the_embedding_as_it_is_stored(graph):
    """ONNX Runtime folds `Transpose(W)` into a second copy; what it would run is looked at after its optimisation."""
    root = graph("qwen3", steps=2)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(root / "optimised.onnx")
    ort.InferenceSession(str(root / "model.onnx"), options, providers=["CPUExecutionProvider"])
    optimised = ir.load(root / "optimised.onnx").graph
    vocab_sized = [name for name, value in optimised.initializers.items() if VOCAB in value.const_value.shape.numpy()]
    assert vocab_sized == ["model.embed_tokens.weight"]


def test_graph_is_valid_and_readable(graph):
    root = graph("llama", steps=3)
    onnx = pytest.importorskip("onnx")
    onnx.checker.check_model(str(root / "model.onnx"))
    model = ir.load(root / "model.onnx")
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)
    assert "model.layers.2.mlp.down_proj/MatMul_1" in names
    assert "model.layers.2.mlp.down_proj/MatMul_1/pass3" in names
    assert not [node for node in model.graph if node.domain == "loopexport"]
    inputs = {value.name: [str(size) for size in value.shape] for value in model.graph.inputs}
    assert list(inputs)[:5] == [
        "input_ids", "attention_mask", "position_ids", "past_key_values.0.key", "past_key_values.0.value"
    ]  # fmt: skip
    assert inputs["past_key_values.0.key"] == ["batch_size", "2", "past_sequence_length", "16"]
    assert inputs["attention_mask"] == ["batch_size", "total_sequence_length"]
    outputs = [value.name for value in model.graph.outputs]
    assert outputs[:3] == ["logits", "present.0.key", "present.0.value"]


def test_per_step_has_a_slot_for_each_pass(graph):
    model = OnnxModel(graph("llama", steps=3, kv="per_step"))
    slots = [name for name in model.empty_cache(1).values if name.endswith(".key")]
    assert slots == [f"past_key_values.{slot}.key" for slot in range(6 + 2 * 3)]


def test_no_tensor_is_the_example_of_two_inputs(export_dir, monkeypatch):
    """torch would take the inputs for one, without a word."""
    examples = []

    def export(model, arguments, **options):
        inputs, past = arguments
        examples.extend([*inputs.values(), *past])
        raise KeyboardInterrupt  # nothing takes it for a failure of the trace

    monkeypatch.setattr(torch.export, "export", export)
    with pytest.raises(KeyboardInterrupt):
        build.trace_export(loopexport.open_export(export_dir("llama")), "fp32")
    assert len(examples) > 3
    assert len({id(each) for each in examples}) == len(examples)


def test_graph_tells_nothing_of_where_it_was_made(graph):
    content = (graph("llama", steps=2) / "model.onnx").read_bytes()
    assert b"loop_steps" in content, "what else stands in it can be read, then"
    for trace in (b"site-packages", b'File "', b"pkg.torch", str(Path(loopexport.__file__).parent).encode()):
        assert trace not in content
