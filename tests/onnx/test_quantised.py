"""Graphs of bases that are quantised already, and sparse experts in 4 bits, against torch on dequantised weights."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

import onnx_ir as ir
import pytest

import loopexport
from loopexport.errors import OnnxError
from loopexport.onnx import build, export_onnx, plan_onnx, requirements
from loopexport.onnx.weights.source import open_weights
from support.commands import checks, run
from support.quantised import as_awq, as_fp8, as_gptq
from support.tiny import SPAN, save_tiny

WHOLE = {"moe_intermediate_size": 64}  # of experts, so that they are whole blocks of 32


@pytest.fixture
def quantised(tmp_path, monkeypatch, traced):
    """`quantised(make)`: an export of a quantised tiny llama. A plain one has the same trace."""
    monkeypatch.setattr(build, "trace_export", lambda export, *kind: traced("llama", *kind))

    def make(method, **options):
        base = method(save_tiny("llama", tmp_path / "base"), tmp_path / "quantised", **options)
        return loopexport.convert(str(base), tmp_path / "out", span=SPAN, steps=3).root

    return make


def operators(path):
    return Counter(node.op_type for node in ir.load(path).graph.all_nodes())


def test_graph_of_dequantised_weights_equals_torch(quantised):
    root = quantised(as_gptq, symmetric=False)
    assert (
        "the weights of the base are int4, and the graph has them in fp32" in plan_onnx(root, dtype="fp32").warnings[0]
    )
    assert export_onnx(root, dtype="fp32").written
    found, status = checks(root)
    assert found["model_fp32.onnx computes what torch does"]["passed"]
    assert status == 0


@pytest.mark.parametrize(
    ("method", "options"),
    [(as_awq, {}), pytest.param(as_gptq, {"bits": 8, "group": -1, "layout": "gptq_v2"}, marks=pytest.mark.matrix)],
)
def test_graph_keeps_the_codes_of_the_base(quantised, method, options):
    """As it is found: no number of the base is rounded again, and the head, which it left alone, stays."""
    root = quantised(method, **options)
    plan = plan_onnx(root)
    assert plan.quantisation.kept
    assert export_onnx(root).written
    (name,) = plan.graphs
    graph = ir.load(root / name)
    assert operators(root / name)["MatMulNBits"] == 7 * 6 + 5 * 2 * (
        SPAN[1] - SPAN[0]
    )  # iterations need no new K and V
    matrix = open_weights(loopexport.open_export(root)).quantised("model.layers.0.mlp.up_proj.weight").packed()
    stored = graph.graph.initializers["model.layers.0.mlp.up_proj.weight.codes"].const_value.numpy()
    assert (stored == matrix.B).all()
    assert "lm_head.weight" in graph.graph.initializers
    assert checks(root)[0][f"{name} computes what torch does"]["passed"]
    data = root / plan.data
    data.write_bytes(damaged(data.read_bytes(), graph, "model.layers.0.mlp.up_proj.weight.scales"))
    assert not checks(root)[0][f"{name} computes what torch does"]["passed"]


def damaged(raw, graph, name):
    """The bytes of a data file, with one number of a tensor twice as large."""
    tensor = graph.graph.initializers[name].const_value
    numbers = tensor.numpy().copy().reshape(-1)
    numbers[3] *= 2
    return raw[: tensor.offset] + numbers.tobytes() + raw[tensor.offset + tensor.length :]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"dtype": "int8"},
            "the base is quantised in int4 already, and its codes stay as they are: use --dtype int4",
        ),
        ({"dtype": "int4", "block_size": 64}, "--block-size is for a base that is not quantised"),
    ],
)
def test_codes_of_the_base_are_not_quantised_again(quantised, options, says):
    with pytest.raises(OnnxError, match=says):
        plan_onnx(quantised(as_gptq), **options)


def test_plan_says_what_becomes_of_fp8(quantised):
    warnings = plan_onnx(quantised(as_fp8), dtype="fp32").warnings
    assert "weights in fp8, which ONNX Runtime does not multiply by: the graph has them in fp32" in warnings[0]
    assert "may round activations, too; the graph does not" in warnings[1]


def test_matrices_of_a_family_that_has_them_transposed_are_refused(tmp_path):
    base = as_gptq(save_tiny("gpt2", tmp_path / "base"), tmp_path / "quantised")
    root = loopexport.convert(str(base), tmp_path / "out", span=SPAN, steps=3).root
    assert "has its matrices transposed (transformer.h.0.attn.c_attn)" in run("onnx", root, "--dtype", "fp32").stderr


@pytest.mark.matrix
def test_sparse_experts_in_four_bits_equal_torch(tmp_path, monkeypatch):
    """Quantised here, or by the base: then the codes of all experts are put together as the native model has them."""
    base = save_tiny("qwen3_moe", tmp_path / "base", **WHOLE)
    once = lru_cache(lambda *kind, trace=build.trace_export: trace(loopexport.open_export(tmp_path / "own"), *kind))
    monkeypatch.setattr(build, "trace_export", lambda export, *kind: once(*kind))
    for name, source in (("own", base), ("kept", as_gptq(base, tmp_path / "quantised", symmetric=False))):
        root = loopexport.convert(str(source), tmp_path / name, span=SPAN, steps=2).root
        assert export_onnx(root, dtype="int4").written, name
        assert operators(root / "model_q4.onnx")["QMoE"] > 4


def test_sparse_experts_in_four_bits_are_refused_on_an_onnxruntime_without_them(tmp_path, monkeypatch):
    base = save_tiny("qwen3_moe", tmp_path / "base", **WHOLE)
    root = loopexport.convert(str(base), tmp_path / "out", span=SPAN, steps=2).root
    warnings = plan_onnx(root, dtype="int4", attention="gqa").warnings
    assert [line for line in warnings if "onnxruntime 1." in line] == [
        "attention gqa with kv shared runs on onnxruntime 1.31 or newer",
        "a QMoE of sparse experts runs on onnxruntime 1.25 or newer",
    ]
    real = requirements.version
    monkeypatch.setattr(requirements, "version", lambda name: "1.24.0" if name == "onnxruntime" else real(name))
    says = "onnxruntime 1.24.0 cannot run a QMoE of sparse experts; install 1.25 or newer, or use --dtype fp32"
    with pytest.raises(OnnxError, match=says):
        plan_onnx(root, dtype="int4")
    with pytest.raises(OnnxError, match=r"install 1\.31 or newer, or use --attention portable"):
        plan_onnx(root, dtype="int4", attention="gqa")
    assert plan_onnx(root, dtype="fp32")


@pytest.mark.parametrize(
    ("family", "options", "dtype"),
    [("qwen3_moe", {}, "int4"), ("qwen3_moe", WHOLE, "int8"), ("gpt_oss", WHOLE, "int4")],
)
def test_experts_that_stay_are_told(tmp_path, family, options, dtype):
    """Rows that are no whole blocks; 8 bits, in which QMoE rounds activations; experts with biases."""
    base = save_tiny(family, tmp_path / "base", **options)
    root = loopexport.convert(str(base), tmp_path / "out", span=SPAN, steps=2).root
    plan = plan_onnx(root, dtype=dtype)
    assert not plan.whole_experts
    assert any("sparse experts such as" in warning for warning in plan.warnings)
