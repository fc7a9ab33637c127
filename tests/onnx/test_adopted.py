"""ONNX graphs of an adopted export hold the trained weights."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import loopexport
from loopexport.onnx import build
from support.commands import checks
from support.compare import assert_close
from support.forwards import full_forward
from support.tiny import tiny_tokens
from support.trained import save_trained


@pytest.mark.parametrize("vocab", [None, pytest.param(140, marks=pytest.mark.matrix)])
def test_graph_of_an_adopted_export_computes_with_the_trained_weights(export_dir, traced, monkeypatch, tmp_path, vocab):
    root = save_trained(export_dir("llama"), tmp_path / "tuned", vocab=vocab)
    loopexport.adopt(root)
    if vocab is None:  # the base's trace, which has no weights, fits
        monkeypatch.setattr(build, "trace_export", lambda export, *kind: traced("llama", *kind))
    loopexport.export_onnx(root, verify=False)
    outcome, status = checks(root, "--files-only")
    assert status == 0, outcome
    assert loopexport.open_export(root).manifest.trained
    assert "looped and trained" in (root / "README.md").read_text()
    tokens = tiny_tokens(1, 8)
    graph = loopexport.OnnxModel(root)
    ours, _ = graph.forward(tokens.numpy())
    looped = AutoModelForCausalLM.from_pretrained(root, trust_remote_code=True)
    assert_close(torch.from_numpy(ours), full_forward(looped, tokens))
