"""How the stand-ins of `looped_cache` answer layers that pool several tokens into one key (DeepSeek V4).

Every export has a copy of this file. It needs only torch and transformers.

Such a layer finds its own cache slot in `cache.layers` and calls methods of it, which keep the pools and the tokens of
an unfinished pool. With `shared`, an iteration gets the answers of the natural pass, so it reads the natural pools.
With `per_step`, it calls the slot of its own.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import DynamicCache

# A method that only the slots of such layers have.
POOLS = "store_compression_weights"


def pools_tokens(layer: nn.Module) -> bool:
    """Whether a decoder layer pools several tokens into one key."""
    return getattr(getattr(layer, "self_attn", None), "compressor", None) is not None


def natural_cache(layer: nn.Module, cache):
    """The cache for the natural pass of a layer; one that pools needs a slot to record, also in a model without one."""
    if cache is not None or not pools_tokens(layer):
        return cache
    native: Any = layer
    return DynamicCache(config=native.self_attn.config)


def check_not_pooling(layer: nn.Module) -> None:
    """Raise ValueError if a layer pools tokens: gradient checkpointing would lose the pools of the natural pass."""
    if pools_tokens(layer):
        raise ValueError(
            "kv shared over layers that pool tokens does not work with gradient checkpointing; switch it off, or set "
            "loop_kv to per_step"
        )


class RecordedPools:
    """A cache slot in the natural pass: it answers as the real one, and records the answers.

    Attributes:
        slot: the real slot.
        answers: the answers to all calls, in order.
    """

    def __init__(self, slot):
        self.slot = slot
        self.answers: list = []

    def __getattr__(self, name):
        member = getattr(self.slot, name)
        return self._recorded(member) if callable(member) else member

    def _recorded(self, method):
        def call(*args, **kwargs):
            self.answers.append(method(*args, **kwargs))
            return self.answers[-1]

        return call


class ReplayedPools:
    """A cache slot in an iteration under `shared`: it stores nothing, and gives the answers of the natural pass."""

    def __init__(self, answers: list):
        self._left = iter(answers)

    def __getattr__(self, name):
        return lambda *args, **kwargs: next(self._left)


class OneSlot:
    """A list of layers that has the same slot under every number."""

    def __init__(self, slot):
        self.slot = slot

    def __getitem__(self, layer_idx: int):
        return self.slot


class NaturalSlots:
    """The layers of a cache in the natural pass, which records the slot that pools.

    Attributes:
        natural: the `NaturalPass`.
        layers: the real layers.
    """

    def __init__(self, natural, layers):
        self.natural = natural
        self.layers = layers

    def __getitem__(self, layer_idx: int):
        slot = self.layers[layer_idx]
        if not hasattr(slot, POOLS):
            return slot
        if self.natural.pools is None:
            self.natural.pools = RecordedPools(slot)
        return self.natural.pools
