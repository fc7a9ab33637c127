"""Graphs of bases that are quantised already, against torch on what their codes stand for."""

from __future__ import annotations

import pytest

import loopexport
from loopexport.onnx import build, export_onnx
from support.commands import checks, run
from support.quantised import as_fp8, as_gptq
from support.tiny import SPAN, save_tiny


@pytest.fixture
def quantised(tmp_path, monkeypatch, traced):
    """`quantised(make)`: an export of a quantised tiny llama. A plain one has the same trace."""
    monkeypatch.setattr(build, "trace_export", lambda export, *kind: traced("llama", *kind))

    def make(method, **options):
        base = method(save_tiny("llama", tmp_path / "base"), tmp_path / "quantised", **options)
        return loopexport.convert(str(base), tmp_path / "out", span=SPAN, steps=3).root

    return make


def test_graph_of_dequantised_weights_equals_torch(quantised):
    root = quantised(as_gptq, symmetric=False)
    outcome = export_onnx(root, dtype="fp32")
    assert outcome.written
    found, status = checks(root)
    assert found["model_fp32.onnx computes what torch does"]["passed"]
    assert status == 0


def test_plan_says_what_becomes_of_fp8(quantised):
    result = run("onnx", quantised(as_fp8), "--dtype", "fp32", "--dry-run")
    assert (
        "weights in fp8, which ONNX Runtime does not multiply by: the graph has them in fp32"
        in result.stderr + result.stdout
    )


def test_matrices_of_a_family_that_has_them_transposed_are_refused(tmp_path):
    base = as_gptq(save_tiny("gpt2", tmp_path / "base"), tmp_path / "quantised")
    root = loopexport.convert(str(base), tmp_path / "out", span=SPAN, steps=3).root
    assert "has its matrices transposed (transformer.h.0.attn.c_attn)" in run("onnx", root, "--dtype", "fp32").stderr
