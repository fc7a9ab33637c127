"""`kv reference` is what the paper's authors run: their prefill and decode paths, restated over a plain model.

From `loop_qwen3.py` of their published code, cache strategy "first": in prefill the span is iterated without any cache;
in decode each iteration appends its keys and values to the cache, attends, and is cropped off again; what stays in the
cache are those of one straight pass over what entered the span. Layer mode (`layer_anchored_frozen`) does the same for
one layer at a time, with the routers' answers of the straight pass.
"""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from transformers import DynamicCache

from loopexport.loop.spec import RULES
from support.compare import assert_close, assert_differs
from support.forwards import run_chunks
from support.oracle import UPDATES
from support.routing import run_without_ties
from support.rule_values import STEPS, VALUES
from support.tiny import SPAN

PREFILL, DECODE = 7, 5
CHUNKS = (PREFILL, *[1] * DECODE)


class Authors:
    """A plain qwen3 or qwen3_moe model, run as the authors' patch runs it."""

    def __init__(self, model, span, steps, rule="euler", anchor=0.0, mode="block", decode="full", **values):
        self.model, self.layers = model, list(model.model.layers)
        bodies = [tuple(range(*span))] if mode == "block" else [(number,) for number in range(*span)]
        self.bodies = {body[0]: body for body in bodies}
        self.frozen = values.pop("frozen_routing", False)
        self.decode, self.anchor, self.steps = decode, anchor, steps
        self.update = lambda *args, **kwargs: UPDATES[rule](*args, steps=steps, **values, **kwargs)

    @torch.no_grad()
    def logits(self, tokens, chunks):
        """Logits of all tokens, chunk by chunk."""
        self.cache, logits, start = DynamicCache(), [], 0
        for length in chunks:
            logits.append(self.forward(tokens[:, start : start + length], start))
            start += length
        return torch.cat(logits, dim=1)

    def forward(self, tokens, start):
        h = self.model.model.embed_tokens(tokens)
        self.positions = torch.arange(start, start + tokens.shape[1])[None]
        self.rotary = self.model.model.rotary_emb(h, self.positions)
        loops = start == 0 or self.decode == "full"
        number = 0
        while number < len(self.layers):
            body = self.bodies.get(number) if loops else None
            h = self.loop(body, h, start) if body else self.run((number,), h, self.cache)
            number = body[-1] + 1 if body else number + 1
        return self.model.lm_head(self.model.model.norm(h))

    def loop(self, body, x, start):
        past = copy.deepcopy(self.cache)
        self.routes, outputs = {}, []
        n = self.run(body, x, self.cache, record=self.routes, outputs=outputs)  # writes what stays

        def g(h, each=lambda h: h):
            trial = copy.deepcopy(past) if start else None  # appended to and thrown away, or no cache at all
            return self.run(body, h, trial, replay=self.routes if self.frozen else {}, each=each)

        return self.anchor * n + (1 - self.anchor) * self.update(x, n, g, natural_outputs=outputs)

    def run(self, body, h, cache, record=None, replay=None, outputs=None, each=lambda h: h):
        for number in body:
            layer = self.layers[number]
            hooks = self.hooks(number, record, replay or {})
            names = inspect.signature(layer.forward).parameters
            cache_name = next(name for name in ("cache", "past_key_values", "past_key_value") if name in names)
            h = layer(
                h,
                position_ids=self.positions,
                position_embeddings=self.rotary,
                cache_position=self.positions[0],
                use_cache=cache is not None,
                **{cache_name: cache},
            )
            h = each(h[0] if isinstance(h, tuple) else h)
            for hook in hooks:
                hook.remove()
            if outputs is not None:
                outputs.append(h)
        return h

    def hooks(self, number, record, replay):
        router = getattr(self.layers[number].mlp, "gate", None)
        if router is None or (record is None and number not in replay):
            return []
        if record is not None:
            return [router.register_forward_hook(lambda _, args, answer: record.__setitem__(number, answer))]
        return [router.register_forward_hook(lambda *_: replay[number])]


def compare(looped, base, spec):
    tokens, ours = run_without_ties(looped, lambda tokens: run_chunks(looped, tokens, CHUNKS, DynamicCache()), 2, 12)
    assert_close(ours, Authors(base, **spec).logits(tokens, CHUNKS))
    return tokens, ours


@pytest.mark.parametrize("decode", ["full", "bypass"])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_block_anchored_is_the_authors(looped, plain, family, decode):
    spec = {"span": SPAN, "steps": 6, "anchor": 0.5, "decode": decode}
    compare(looped(family, kv="reference", **spec), plain(family), spec)


@pytest.mark.parametrize("damping", [None, 1 / 3])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_layer_anchored_frozen_is_the_authors(looped, plain, family, damping):
    spec = {"span": SPAN, "steps": 6, "anchor": 0.5, "mode": "layer", "damping": damping}
    spec |= {"frozen_routing": True, "norm_interpolation": True}
    compare(looped(family, kv="reference", **spec), plain(family), spec)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_the_authors(looped, plain, rule):
    spec = {"span": SPAN, "steps": STEPS, "rule": rule, **VALUES.get(rule, {})}
    compare(looped("qwen3", kv="reference", **spec), plain("qwen3"), spec)


def test_the_other_policies_are_not_the_authors(looped, plain):
    spec = {"span": SPAN, "steps": 3}
    tokens, reference = compare(looped("qwen3", kv="reference", **spec), plain("qwen3"), spec)
    for kv in ("shared", "per_step"):
        assert_differs(run_chunks(looped("qwen3", kv=kv, **spec), tokens, CHUNKS, DynamicCache()), reference)
