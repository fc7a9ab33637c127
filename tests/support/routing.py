"""Tokens whose experts are not a matter of rounding, so that two orders of the same sums can be compared at all."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from support.tiny import tiny_tokens

SMALLEST_MARGIN = 1e-5  # between the router's last chosen logit and the first one left out; rounding moves them by 1e-7


def run_without_ties(model, run, batch: int, length: int):
    """Tokens `(batch, length)`, and what `run(tokens)` gives, for the first seed at which no router comes near a tie.

    A dense model takes the first seed.
    """
    return draw_without_ties(model, run, lambda seed: tiny_tokens(batch, length, seed))


def draw_without_ties(model, run, draw):
    """`draw(seed)`, and what `run` gives for it, as in `run_without_ties`."""
    for seed in range(1, 20):
        drawn = draw(seed)
        with _router_margins(model) as margins:
            output = run(drawn)
        if min(margins, default=1.0) > SMALLEST_MARGIN:
            return drawn, output
    raise AssertionError("all seeds lead to ties between experts")


@contextmanager
def _router_margins(model):
    margins: list[float] = []
    hooks = [router.register_forward_pre_hook(_recorder(margins, router, chosen)) for router, chosen in _routers(model)]
    try:
        yield margins
    finally:
        for hook in hooks:
            hook.remove()


def _routers(model):
    """The routers of sparse layers, and how many experts each chooses for a token."""
    for module in model.modules():
        router = getattr(module, "gate", None) or getattr(module, "router", None)
        if hasattr(module, "experts") and router is not None:
            yield router, model.config.num_experts_per_tok


def _recorder(margins, router, chosen):
    def record(module, args):
        logits = torch.nn.functional.linear(args[0].flatten(0, -2).float(), router.weight.float(), _bias(router))
        logits = logits.sort(descending=True).values
        margins.append((logits[:, chosen - 1] - logits[:, chosen]).min().item())

    return record


def _bias(router):
    return None if getattr(router, "bias", None) is None else router.bias.float()
