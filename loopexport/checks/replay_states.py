"""The loop by hand over layers that remember more than keys and values: recurrent layers, and indexed attention.

Under per_step and reference, an iteration runs the layer natively, with a copy of its slot in the cache: under per_step
the copy goes on from token to token, under reference it is the natural slot from before this forward.

Under shared, what a token writes into the state is natural, and what only reads the state is the iterate's own. This
file finds out by gradients which channels of the layer's projections a recurrent state depends on. Then it runs the
layer on whole sequences, each with one token of the iterate among natural ones, and replaces these channels by the
natural ones. So a convolution sees natural earlier tokens, and the state is natural, whatever the family's kernels are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

# Attributes of cache slots that hold more than keys and values, by the names of transformers 5.
STATES = ("conv_states", "recurrent_states")
INDEX = "indexer_keys"

MOST_TOKENS = 4096  # of one forward of whole sequences


def keeps_state(cache: Any, number: int) -> bool:
    """Whether the slot of a layer in a cache holds recurrent states."""
    return any(hasattr(_slot(cache, number), name) for name in STATES)


def keeps_index(cache: Any, number: int) -> bool:
    """Whether the slot of a layer in a cache holds the keys of an index."""
    return hasattr(_slot(cache, number), INDEX)


def with_own_slot(cache: Any, number: int) -> Any:
    """The same cache, but with a copy of one slot."""
    own = copy.copy(cache)
    own.layers = [copy.deepcopy(slot) if index == number else slot for index, slot in enumerate(cache.layers)]
    return own


def _slot(cache: Any, number: int) -> Any:
    slots = getattr(cache, "layers", [])
    return slots[number] if number < len(slots) else None


class Slots:
    """The memory of one layer during a sequence.

    Attributes:
        before: the cache as it was before this forward.
        inputs: the natural inputs of earlier forwards, `(batch, past, hidden)`; None before the first.
    """

    def __init__(self, number: int):
        self.number = number
        self.before: Any = None
        self.inputs: torch.Tensor | None = None
        self._own: dict[int, Any] = {}
        self._written: dict[str, torch.Tensor] | None = None

    def begin(self, cache: Any) -> None:
        """Before the natural pass of a forward."""
        self.before = with_own_slot(cache, self.number)

    def end(self, hidden: torch.Tensor) -> None:
        """After all iterations of a forward with this natural input."""
        self.inputs = hidden if self.inputs is None else torch.cat([self.inputs, hidden], dim=1)

    def fresh(self) -> Any:
        """A cache as it was before this forward."""
        return with_own_slot(self.before, self.number)

    def own(self, k: int) -> Any:
        """The cache of iteration k."""
        if k not in self._own:
            self._own[k] = self.fresh()
        return self._own[k]

    def shared(self, layer: nn.Module, run: Callable, natural: torch.Tensor, iterate: torch.Tensor) -> torch.Tensor:
        """The layer's output for an iterate that reads the natural state.

        Args:
            layer: the layer.
            run: `run(hidden, cache)` runs it.
            natural: its natural input, `(batch, chunk, hidden)`.
            iterate: the input of this iteration, `(batch, chunk, hidden)`.
        """
        if self._written is None:
            self._written = written_channels(layer, self.number, lambda: run(natural, cache), cache := self.fresh())
        whole = natural if self.inputs is None else torch.cat([self.inputs, natural], dim=1)
        past, length = whole.shape[1] - natural.shape[1], whole.shape[1]
        groups = torch.arange(natural.shape[1]).split(max(1, MOST_TOKENS // (len(natural) * length)))
        with _written_naturally(layer, self._written, len(whole)):
            return torch.cat([_read(run, whole, iterate, past, group.tolist()) for group in groups], dim=1)


def _read(run: Callable, whole: torch.Tensor, iterate: torch.Tensor, past: int, tokens: list[int]) -> torch.Tensor:
    """The outputs for some tokens of an iterate, each of which is alone among natural ones."""
    variants = []
    for token in tokens:
        variant = whole.clone()
        variant[:, past + token] = iterate[:, token]
        variants.append(variant)
    outputs = run(torch.cat([whole, *variants]), None).split(len(whole))[1:]
    return torch.stack([output[:, past + token] for token, output in zip(tokens, outputs, strict=True)], dim=1)


def written_channels(layer: nn.Module, number: int, run: Callable[[], Any], cache: Any) -> dict[str, torch.Tensor]:
    """The output channels of a layer's projections that its recurrent state depends on, as masks by path.

    Args:
        layer: the layer.
        number: its number.
        run: runs it on several tokens with the cache.
        cache: a cache that the layer may fill.
    """
    outputs: dict[str, torch.Tensor] = {}

    def watch(path: str, module, args, output):
        outputs[path] = output.detach().requires_grad_()
        return outputs[path].clone()

    with torch.enable_grad(), _hooks(layer, watch):
        run()
        states = [state for state in _slot(cache, number).recurrent_states.values() if state is not None]
        if not states:
            return {}
        generator = torch.Generator().manual_seed(0)
        total = sum((state * torch.randn(state.shape, generator=generator)).sum() for state in states)
        gradients = torch.autograd.grad(total, list(outputs.values()), allow_unused=True)
    found = zip(outputs, gradients, strict=True)
    return {path: (each != 0).flatten(0, -2).any(dim=0) for path, each in found if each is not None}


@contextmanager
def _written_naturally(layer: nn.Module, written: dict[str, torch.Tensor], batch: int) -> Iterator[None]:
    """Replace these channels in all rows by those of the first `batch` rows, which are natural."""

    def replace(path: str, module, args, output):
        if path not in written:
            return None
        natural = output[:batch].repeat(len(output) // batch, *[1] * (output.dim() - 1))
        return torch.where(written[path], natural, output)

    with _hooks(layer, replace):
        yield


@contextmanager
def _hooks(layer: nn.Module, hook: Callable) -> Iterator[None]:
    """Set a hook on each linear projection in a layer; its first argument is the path."""
    linear = [(path, module) for path, module in layer.named_modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_hook(partial(hook, path)) for path, module in linear]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
