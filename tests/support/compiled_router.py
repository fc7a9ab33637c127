"""Prints how far torch.compile is off on a CPU for two passes through a router with a bias: 0 if it is right.

As on vLLM, the router's linear layer writes into a tensor that it gets. Run it with the torch of vLLM's environment.
"""

from __future__ import annotations

import torch

TOKENS, WIDTH, EXPERTS, CHOSEN = 10, 128, 4, 2


def linear(out, hidden, weight):
    """Write `hidden @ weight` into `out`."""
    out.copy_(hidden @ weight)


LIBRARY = torch.library.Library("compiled_router", "DEF")
LIBRARY.define("linear(Tensor! out, Tensor hidden, Tensor weight) -> ()")
LIBRARY.impl("linear", linear, "CPU")
LIBRARY.impl("linear", lambda *tensors: None, "Meta")


def two_passes(hidden, weight, bias):
    """Hidden states after two passes, `(tokens, width)`."""
    for _ in range(2):
        logits = torch.empty(hidden.shape[0], weight.shape[1])
        torch.ops.compiled_router.linear(logits, hidden, weight)
        scores = logits.sigmoid()
        chosen = (scores + bias).topk(CHOSEN, dim=1).indices
        hidden = hidden + scores.gather(1, chosen).sum(-1, keepdim=True) * hidden.tanh()
    return hidden


if __name__ == "__main__":
    torch.manual_seed(0)
    inputs = torch.randn(TOKENS, WIDTH), torch.randn(WIDTH, EXPERTS), torch.randn(EXPERTS)
    compiled = torch.compile(two_passes, dynamic=True)(*inputs)
    print((compiled - two_passes(*inputs)).abs().nan_to_num(torch.inf).max().item())
