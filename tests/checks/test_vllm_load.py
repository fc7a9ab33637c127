"""A loaded server answers many requests at once, of mixed lengths and with common beginnings, like transformers.

Needs an environment with vLLM, as `test_vllm.py` does. What keeps this from passing for nothing: prefix-cache hits are
counted, and answers are compared only where no token is nearly as likely as the best: batches round otherwise.
"""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import loopexport
from loopexport.checks.vllm import load_with_transformers
from support.tiny import SPAN
from support.vllm_bases import save_servable
from support.vllm_server import running_server

PYTHON = os.environ.get("LOOPEXPORT_VLLM", "")
if not PYTHON:
    pytest.skip("needs vLLM; `make test-vllm` makes an environment with it", allow_module_level=True)

NUM_REQUESTS, NUM_PROMPTS, AT_ONCE = 2000, 300, 48
CLEAR = 1e-3  # natural logarithm: by how much a token has to be likelier than the second one
HITS = "vllm:prefix_cache_hits_total"
LOOPS = {
    "llama": {},
    "qwen3_moe": {"kv": "per_step", "mode": "layer", "anchor": 0.5, "norm_interpolation": True, "frozen_routing": True},
}


def draw_requests(rng, vocab_size):
    """Pairs of a prompt, of 1 to 154 token ids, and the number of tokens to answer; a part begins alike."""
    beginnings = [[rng.randrange(vocab_size) for _ in range(64)] for _ in range(4)]
    return [
        (
            rng.choice(beginnings)[: rng.choice((0, 32, 64))]
            + [rng.randrange(vocab_size) for _ in range(rng.randint(1, 90))],
            rng.randint(4, 36),
        )
        for _ in range(NUM_PROMPTS)
    ]


def clear_answer(model, prompt: list[int], count: int) -> list[int] | None:
    """The tokens that transformers answers; None unless each of them is clearly the likeliest."""
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **options)
    best = torch.stack(output.logits)[:, 0].topk(2).values
    is_clear = (best[:, 0] - best[:, 1] > CLEAR).all()
    return output.sequences[0, len(prompt) :].tolist() if is_clear else None


@pytest.mark.matrix
@pytest.mark.parametrize("family", LOOPS)
def test_requests_at_once_are_answered_as_by_transformers(tmp_path, family):
    base = save_servable(family, tmp_path / "base")
    export = loopexport.convert(str(base), tmp_path / "out", weights="copy", span=SPAN, steps=3, **LOOPS[family]).root
    environment = {"PYTHONPATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    model = load_with_transformers(export)
    model.generation_config.eos_token_id = None
    rng = random.Random(0)
    answered = [(request, clear_answer(model, *request)) for request in draw_requests(rng, model.config.vocab_size)]
    expected = [(request, tokens) for request, tokens in answered if tokens is not None]
    assert len(expected) > NUM_PROMPTS / 2
    with running_server(PYTHON, export, environment, tmp_path, 8125, max_num_seqs=16) as server:
        asked = [rng.choice(expected) for _ in range(NUM_REQUESTS)]
        hits = server.metric(HITS)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            answers = list(pool.map(lambda each: server.complete(*each[0])["token_ids"], asked))
        assert server.metric(HITS) > hits
    assert answers == [tokens for _, tokens in asked]
