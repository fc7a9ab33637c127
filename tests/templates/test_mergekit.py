"""Loops without damping under per_step are physically unrolled models, bit for bit, as mergekit writes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import loopexport
from loopexport.loop.path import parse_path
from support.compare import assert_bitwise, assert_differs
from support.random_paths import random_path, runs_in
from support.tiny import NUM_LAYERS, SPAN, tiny_tokens
from support.unrolled import slices, unrolled

mergekit = pytest.importorskip("mergekit")

NAIVE = {"steps": 2, "damping": 1.0, "anchor": 0.0, "kv": "per_step"}
ONCE_AGAIN = [(0, SPAN[1]), (SPAN[0], NUM_LAYERS)]

needs_smollm2 = pytest.mark.skipif(
    "LOOPEXPORT_SMOLLM" not in os.environ, reason="no SmolLM2; `make test` sets LOOPEXPORT_SMOLLM"
)


def check_equal(base: Path, tmp_path: Path, ranges, tokens: torch.Tensor, **loop):
    """Compare an export with mergekit's model of these ranges of layers: logits, cached decoding, generation."""
    base_model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    unrolled(base, tmp_path / "unrolled", ranges)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "unrolled", dtype=torch.float32).eval()
    export = loopexport.convert(str(base), tmp_path / "looped", weights="auto", **loop)
    ours = AutoModelForCausalLM.from_pretrained(export.root, trust_remote_code=True, dtype=torch.float32).eval()
    assert theirs.config.num_hidden_layers == sum(stop - start for start, stop in ranges)
    half = tokens.shape[1] // 2
    with torch.no_grad():
        logits = ours(tokens).logits
        assert_bitwise(logits, theirs(tokens).logits)
        assert_differs(logits, base_model(tokens).logits)
        caches = [model(tokens[:, :half], use_cache=True).past_key_values for model in (ours, theirs)]
        for position in range(half, tokens.shape[1]):
            step = tokens[:, position : position + 1]
            assert_bitwise(*(m(step, past_key_values=c).logits for m, c in zip((ours, theirs), caches, strict=True)))
    for use_cache in (True, False):
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "use_cache": use_cache}
        assert torch.equal(ours.generate(tokens, **options), theirs.generate(tokens, **options))
    return export


def recipe(tmp_path: Path, base: Path, ranges) -> Path:
    """A mergekit config in a file."""
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(slices(base, ranges)))
    return path


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_naive_per_step_equals_mergekit_passthrough(tiny_base, tmp_path, family):
    check_equal(tiny_base(family), tmp_path, ONCE_AGAIN, tiny_tokens(2, 12), span=SPAN, **NAIVE)


def test_rys_pair_equals_mergekit_passthrough(tiny_base, tmp_path):
    export = check_equal(tiny_base(), tmp_path, ONCE_AGAIN, tiny_tokens(2, 12), rys=SPAN)
    assert export.spec == loopexport.LoopSpec(span=SPAN, **NAIVE)


@pytest.mark.parametrize("seed", [1, 2, 6, 7, 8, 15, 17, 18, 20])
def test_random_slices_equal_mergekit(tiny_base, tmp_path, seed):
    base = tiny_base(("llama", "mistral")[seed % 2])
    ranges = runs_in(random_path(seed, NUM_LAYERS, leaves_out=seed % 3 == 0))
    file = recipe(tmp_path, base, ranges)
    check_equal(base, tmp_path, ranges, tiny_tokens(2, 12), from_mergekit=file)


@pytest.mark.parametrize(
    ("path", "steps"),
    [
        ("0-3,1-3,1-3,1-5", 4),  # a span, K times
        ("0-1,0-1,2-4,3-4,3-5", (2, 3)),  # K by span
        ("0-3,1-2,3-4,2-5", None),  # detours that overlap
        ("0-4,1-2,0-4,5", None),
        ("0,2-4", None),  # deletion, of the last layer too
    ],
)
def test_paths_equal_mergekit(tiny_base, tmp_path, path, steps):
    ranges = parse_path(path)
    export = check_equal(tiny_base(), tmp_path, ranges, tiny_tokens(2, 12), path=path)
    assert (export.spec.steps if export.spec.path is None else None) == steps


@needs_smollm2
@pytest.mark.parametrize("place", ["span", "path"])
def test_smollm2_equals_mergekit(tmp_path, place):
    base = Path(os.environ["LOOPEXPORT_SMOLLM"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokens = tokenizer("The quick brown fox jumps over the lazy dog, and then it", return_tensors="pt").input_ids
    if place == "span":
        check_equal(base, tmp_path, [(0, 17), (13, 30)], tokens, span=(13, 17), **NAIVE)
    else:
        ranges = [(0, 15), (12, 15), (10, 20), (16, 25), (26, 30)]
        export = check_equal(base, tmp_path, ranges, tokens, from_mergekit=recipe(tmp_path, base, ranges))
        assert export.spec.path is not None
