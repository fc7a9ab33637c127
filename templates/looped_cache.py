"""What a layer is handed in place of the K/V cache, for each K/V policy; and the extra slots of `per_step`.

Copied byte for byte into every exported directory; it needs torch and transformers alone. No class here is a `Cache`
subclass: those break when transformers is upgraded. A new K/V policy needs a stand-in here, a line in
`looped_walk.LayerCall._iteration_cache`, and its name in `looped_spec.KV_POLICIES`.

Keys and values are `(batch, heads, seq, head_dim)`. What `update()` takes holds the chunk's tokens alone, what it
answers all that attention may read: the past and the chunk. Multi-head latent attention caches latents in their place.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DynamicCache

from .looped_spec import LoopSpec

# What native layers call the argument that carries the K/V cache, newest name first.
CACHE_ARGUMENTS = ("cache", "past_key_values", "past_key_value", "layer_past")


class CacheArgument(NamedTuple):
    """The argument in which a module takes the K/V cache.

    Attributes:
        name: how it is called.
        position: its number among the positional arguments, counted from 0.
    """

    name: str
    position: int

    def value_in(self, args, kwargs):
        """The cache that a call was given, or None."""
        return kwargs.get(self.name, args[self.position] if self.position < len(args) else None)

    def put(self, cache, args: list, kwargs: dict) -> None:
        """Give a call another cache, in place."""
        if self.position < len(args):
            args[self.position] = cache
        else:
            kwargs[self.name] = cache


def find_cache_argument(module: nn.Module) -> CacheArgument | None:
    """The argument in which a decoder layer or model takes the K/V cache; None where it takes none."""
    names = list(inspect.signature(module.forward).parameters)
    found = next((name for name in CACHE_ARGUMENTS if name in names), None)
    return None if found is None else CacheArgument(found, names.index(found))


class CacheStandIn:
    """Answers everything but `update` like the cache behind it; like an empty one where the model runs without cache.

    Attributes:
        cache: the cache behind it, or None.
        length: how long the layer was told that the cache is in the natural pass. Llama 4 computes positions from it,
            and its tokens are already stored when iterations run.
    """

    length: Any = None

    def __init__(self, cache):
        self.cache = cache

    def get_seq_length(self, *args, **kwargs):
        return self._ask_length(*args, **kwargs) if self.length is None else self.length

    def _ask_length(self, *args, **kwargs):
        return self.__getattr__("get_seq_length")(*args, **kwargs)

    def __getattr__(self, name):
        if "conv" in name or "recurrent" in name or "ssm" in name or "linear" in name or "indexer" in name:
            raise ValueError(
                f"cannot loop a layer that keeps more than keys and values in its cache ({name}); choose another span"
            )
        return getattr(DynamicCache() if self.cache is None else self.cache, name)


class NaturalPass(CacheStandIn):
    """Stores as usual, and records what iterations need.

    Attributes:
        new: the chunk's keys and values, each `(batch, heads, chunk, head_dim)`; empty until the layer stored them.
        read: the keys and values that attention read, each `(batch, heads, past + chunk, head_dim)`.
        rest: what else the layer passed to `update`, as `(args, kwargs)`.
    """

    new: tuple = ()
    read: tuple = ()
    rest: tuple = ((), {})

    def get_seq_length(self, *args, **kwargs):
        length = self._ask_length(*args, **kwargs)
        if self.length is None:  # a static cache counts in place
            self.length = length.clone() if isinstance(length, torch.Tensor) else length
        return length

    def update(self, keys, values, layer_idx, *args, **kwargs):
        self.new, self.rest = (keys, values), (args, kwargs)
        self.read = self.new if self.cache is None else self.cache.update(keys, values, layer_idx, *args, **kwargs)
        return self.read


class SharedRead(CacheStandIn):
    """Policy `shared`: stores nothing, and answers with the natural pass's keys and values.

    Attributes:
        read: as in `NaturalPass`, `(batch, heads, past + chunk, head_dim)` each.
    """

    def __init__(self, cache, read):
        super().__init__(cache)
        self.read = read

    def update(self, keys, values, *args, **kwargs):
        return self.read


class OwnChunk(CacheStandIn):
    """Policy `reference`: stores nothing, and answers with the natural past and the iterate's own chunk.

    Attributes:
        read: as in `NaturalPass`, `(batch, heads, past + chunk, head_dim)` each.
        start: position of the chunk in `read`; None where the chunk is its end.
    """

    def __init__(self, cache, read, start):
        super().__init__(cache)
        self.read = read
        self.start = start

    def update(self, keys, values, *args, **kwargs):
        return self._replace_chunk(self.read[0], keys), self._replace_chunk(self.read[1], values)

    def _replace_chunk(self, read, own):
        length = own.shape[-2]
        if self.start is None:
            return torch.cat([read[..., : read.shape[-2] - length, :], own], dim=-2)
        positions = self.start + torch.arange(length, device=read.device)
        return read.index_copy(-2, positions, own)


class OwnSlot(CacheStandIn):
    """Policy `per_step`: stores into, and reads from, the cache slot of this layer and iteration.

    Attributes:
        read: as in `NaturalPass`; the slot must have the same length.
        slot: number of the slot in the cache.
    """

    def __init__(self, cache, read, slot):
        super().__init__(cache)
        self.read = read
        self.slot = slot

    def update(self, keys, values, layer_idx, *args, **kwargs):
        own = self.cache.update(keys, values, self.slot, *args, **kwargs)
        if own[0].shape[-2] != self.read[0].shape[-2]:
            raise ValueError(_foreign_cache(f"slot {self.slot} and layer {layer_idx} differ in length"))
        return own


def chunk_start(cache, layer_idx: int, natural: NaturalPass):
    """Position at which the chunk that the natural pass just stored starts in what it read.

    None means at the end, as everywhere but in a static layer, which returns a buffer longer than what it holds.
    """
    length, read_length = natural.new[0].shape[-2], natural.read[0].shape[-2]
    layer = cache.layers[layer_idx] if hasattr(cache, "layers") else None
    if layer is None or not layer.is_compileable or read_length != layer.max_cache_len:
        return None
    last = read_length - length
    cache_kwargs = next(iter(natural.rest[0]), None)
    if cache_kwargs is not None and cache_kwargs.get("cache_position") is not None:  # transformers 4
        return cache_kwargs["cache_position"][0].clamp(max=last)
    if hasattr(layer, "cumulative_length_int"):  # a sliding window, which stays at its end once it is full
        return min(layer.cumulative_length_int - length, last)
    return layer.cumulative_length - length


def is_empty(cache, layer_idx: int, num_tokens: int) -> bool:
    """Whether the cache held nothing for this layer before this forward, of `num_tokens`."""
    if not hasattr(cache, "layers"):  # a family's own cache class, transformers 4
        return int(cache.get_seq_length(layer_idx)) == 0
    if layer_idx >= len(cache.layers) or not cache.layers[layer_idx].is_initialized:
        return True
    # A static cache knows its length as a tensor only, which a compiled graph cannot branch on. What is compiled on an
    # initialised static cache are decode steps.
    if torch.compiler.is_compiling():
        return False
    # A layer that reuses the keys of an earlier one holds none; the earlier one has stored this forward's already.
    owner = next(index for index in range(layer_idx, -1, -1) if getattr(cache.layers[index], "keys", None) is not None)
    return int(cache.get_seq_length(owner)) == (0 if owner == layer_idx else num_tokens)


def add_slots(cache, spec: LoopSpec, num_layers: int, num_tokens: int) -> None:
    """Give the cache one slot for each looped layer and iteration, of the kind that the layer itself has.

    A cache that was made without a config adds slots by itself when they are first stored into.

    Raises:
        ValueError: the cache was filled under another loop setting, or is of a kind that takes no slots.
    """
    if type(cache).__module__.startswith("transformers.models."):  # a family's own, which counts its slots its own way
        raise ValueError(f"kv per_step cannot add slots to a {type(cache).__name__}; use kv shared")
    count = len(cache.layers)
    if count < num_layers or count == num_layers + spec.extra_kv_slots:
        return
    if count != num_layers or not is_empty(cache, spec.layers[0], num_tokens):
        raise ValueError(_foreign_cache(f"it has {count} slots, not {num_layers + spec.extra_kv_slots}"))
    for _ in range(1, spec.evaluations):
        cache.layers.extend(_empty_slot_like(cache.layers[index]) for index in spec.layers)


def _empty_slot_like(layer):
    slot = copy.deepcopy(layer)
    slot.reset()
    return slot


def _foreign_cache(why: str) -> str:
    return f"the K/V cache was filled under another loop setting ({why}); start with a new cache"
