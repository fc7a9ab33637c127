"""The argument of a decoder or a layer that takes the K/V cache.

Every export has a copy of this file. It needs only torch.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple, cast

from torch import nn

# Names of the K/V cache argument in native layers, newest first.
CACHE_ARGUMENTS = ("cache", "past_key_values", "past_key_value", "layer_past")


class CacheArgument(NamedTuple):
    """The argument of a module that takes the K/V cache.

    Attributes:
        name: its name.
        position: its position among the positional arguments, counted from 0.
    """

    name: str
    position: int

    def value_in(self, args, kwargs):
        """The cache in the arguments of a call, or None."""
        return kwargs.get(self.name, args[self.position] if self.position < len(args) else None)

    def put(self, cache, args: list, kwargs: dict) -> None:
        """Replace the cache in the arguments of a call, in place."""
        if self.position < len(args):
            args[self.position] = cache
        else:
            kwargs[self.name] = cache


def find_cache_argument(module: nn.Module) -> CacheArgument | None:
    """The argument of a decoder layer or model that takes the K/V cache; None if it has none."""
    names = list(inspect.signature(module.forward).parameters)
    found = next((name for name in CACHE_ARGUMENTS if name in names), None)
    if found is None and "kwargs" in names and hasattr(module, "self_attn"):  # it hands all keywords to its attention
        inner = find_cache_argument(cast(nn.Module, module.self_attn))
        return None if inner is None else CacheArgument(inner.name, len(names))
    return None if found is None else CacheArgument(found, names.index(found))


def self_attention(cache):
    """The cache of a decoder's own keys and values, also in decoders that can attend to an encoder."""
    return getattr(cache, "self_attention_cache", cache)
