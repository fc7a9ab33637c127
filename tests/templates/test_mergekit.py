"""Naive looping under per_step is a physically unrolled model, bit for bit; mergekit's passthrough is the witness."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import loopexport
from support.compare import assert_bitwise, assert_differs
from support.tiny import SPAN, tiny_tokens
from support.unrolled import unrolled

mergekit = pytest.importorskip("mergekit")

NAIVE = {"steps": 2, "damping": 1.0, "anchor": 0.0, "kv": "per_step"}


def check_equal(base: Path, tmp_path: Path, span: tuple[int, int], tokens: torch.Tensor) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    num_layers = theirs.config.num_hidden_layers
    with torch.no_grad():
        plain = theirs(tokens).logits
    unrolled(base, tmp_path / "unrolled", span, num_layers)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "unrolled", dtype=torch.float32).eval()
    out = loopexport.convert(str(base), tmp_path / "looped", span=span, weights="auto", **NAIVE).root
    ours = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32).eval()
    assert theirs.config.num_hidden_layers == num_layers + span[1] - span[0]
    half = tokens.shape[1] // 2
    with torch.no_grad():
        assert_bitwise(ours(tokens).logits, theirs(tokens).logits)
        assert_differs(ours(tokens).logits, plain)
        caches = [model(tokens[:, :half], use_cache=True).past_key_values for model in (ours, theirs)]
        for position in range(half, tokens.shape[1]):
            step = tokens[:, position : position + 1]
            assert_bitwise(*(m(step, past_key_values=c).logits for m, c in zip((ours, theirs), caches, strict=True)))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(tokens, **options), theirs.generate(tokens, **options))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_naive_per_step_equals_mergekit_passthrough(tiny_base, tmp_path, family):
    check_equal(tiny_base(family), tmp_path, SPAN, tiny_tokens(2, 12))


@pytest.mark.skipif("LOOPEXPORT_SMOLLM" not in os.environ, reason="no SmolLM2; `make test` sets LOOPEXPORT_SMOLLM")
def test_naive_per_step_equals_mergekit_passthrough_on_smollm2(tmp_path):
    base = Path(os.environ["LOOPEXPORT_SMOLLM"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokens = tokenizer("The quick brown fox jumps over the lazy dog, and then it", return_tensors="pt").input_ids
    check_equal(base, tmp_path, (13, 17), tokens)
