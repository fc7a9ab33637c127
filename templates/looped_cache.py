"""The cache stand-ins that a layer gets instead of the K/V cache, one for each K/V policy, and the slots of `per_step`.

Every export has a copy of this file. It needs only torch and transformers. No class here is a `Cache` subclass, since
those break when transformers is upgraded. A new K/V policy needs a stand-in here, a line in
`looped_walk.LayerCall._iteration_cache`, and its name in `looped_spec.KV_POLICIES`.

Keys and values are `(batch, heads, seq, head_dim)`. `update()` takes the keys and values of the current chunk and
returns those that attention may read: the past and the chunk. Multi-head latent attention passes latents instead.
Indexed attention chooses the positions that it reads. It stores one key more for each token, `(batch, seq, dim)`, by
`update_indexer()`, which answers like `update()`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .looped_path import extra_slots_of, skipped_by
from .looped_pools import NaturalSlots, OneSlot, ReplayedPools
from .looped_spec import FIELDS, LoopSpec, bodies_within, first_of
from .looped_states import (
    HAS_STATE,
    STATE_CALLS,
    NaturalPast,
    NaturalPresent,
    NaturalStates,
    NoPast,
    OwnStates,
    RecordStates,
    has_past,
)

# Attribute that we set on a cache: the loop of the latest forward that stored there, as `_fingerprint` gives it.
FILLED_BY = "loop_filled_by"

# Attribute that we set on a cache: the number of its first extra slot.
FIRST_SLOT = "loop_first_slot"

# Attribute that we set on a cache: the loop that its extra slots are for, as `_fingerprint` gives it.
SLOTS_FOR = "loop_slots_for"


class CacheStandIn:
    """Passes everything but `update` on to the real cache, or to an empty one if the model runs without a cache.

    Attributes:
        cache: the real cache, or None.
        answers: the lengths and offsets that the layer was told in the natural pass, by the name of the call. Llama 4
            and Inkling compute positions from them, and in an iteration the real cache already holds the chunk.
        states: the recurrent states that the layer saw in the natural pass.
        read: the keys and values that the layer reads, if they are known.
        pools: for a layer that pools tokens, its slot in the natural pass as recorded, or as replayed; else None.
    """

    pools: Any = None
    read: tuple = ()

    def __init__(self, cache):
        self.cache = cache
        self.answers: dict[str, Any] = {}
        self.states = NaturalStates()

    def see(self, natural: NaturalPass):
        """Let an iteration find the lengths and the states that the natural pass found; returns this stand-in."""
        self.answers, self.states, self.pools = natural.answers, natural.states, natural.pools
        return self

    def ask(self, name: str, *args, **kwargs):
        """What the real cache answers to a call."""
        return CacheStandIn.__getattr__(self, name)(*args, **kwargs)

    @property
    def layers(self):
        """The real cache's layers; without a cache, one that holds what this layer reads, under any number."""
        if self.cache is not None or not self.read:
            return self.__getattr__("layers")
        layer = DynamicLayer()
        layer.update(*self.read[:2])
        return OneSlot(layer)

    def get_seq_length(self, *args, **kwargs):
        return self._answer("get_seq_length", *args, **kwargs)

    def get_mask_sizes(self, *args, **kwargs):
        return self._answer("get_mask_sizes", *args, **kwargs)

    def get_query_offset(self, *args, **kwargs):
        return self._answer("get_query_offset", *args, **kwargs)

    def _answer(self, name: str, *args, **kwargs):
        return self.answers[name] if name in self.answers else self.ask(name, *args, **kwargs)

    def __getattr__(self, name):
        if name in STATE_CALLS:
            return getattr(NoPast() if self.cache is None else self.cache, name)
        if "conv" in name or "recurrent" in name or "ssm" in name or "linear" in name:
            raise ValueError(f"cannot loop a layer that keeps {name} in its cache; choose another span")
        return getattr(DynamicCache() if self.cache is None else self.cache, name)


class NaturalPass(RecordStates, CacheStandIn):
    """For the natural pass: stores in the real cache, and records what iterations need.

    Attributes:
        new: the chunk's keys and values, each `(batch, heads, chunk, head_dim)`; empty until the layer stores them.
        read: the keys and values that attention reads, each `(batch, heads, past + chunk, head_dim)`.
        rest: the other arguments of `update`, as `(args, kwargs)`.
        states: the states of recurrent layers from before this chunk.
        new_index, read_index: the same of the index keys, each a tuple of one; empty for a layer without an indexer.
        is_shared: whether the policy is `shared`, for which `looped_recurrent` records mixers.
    """

    is_shared = False
    new: tuple = ()
    read: tuple = ()
    rest: tuple = ((), {})
    new_index: tuple = ()
    read_index: tuple = ()

    @property
    def layers(self):
        return NaturalSlots(self, super().layers)

    @property
    def seen(self) -> tuple:
        """All that the layer read: keys, values and, if it has an indexer, index keys."""
        return (*self.read, *self.read_index)

    def _answer(self, name: str, *args, **kwargs):
        answer = self.ask(name, *args, **kwargs)
        if name not in self.answers:  # a static cache updates its count in place
            self.answers[name] = answer.clone() if isinstance(answer, torch.Tensor) else answer
        return answer

    def update(self, keys, values, layer_idx, *args, **kwargs):
        self.new, self.rest = (keys, values), (args, kwargs)
        self.read = self.new if self.cache is None else self.cache.update(keys, values, layer_idx, *args, **kwargs)
        return self.read

    def update_indexer(self, keys, layer_idx):
        self.new_index = (keys,)
        self.read_index = self.new_index if self.cache is None else (self.cache.update_indexer(keys, layer_idx),)
        return self.read_index[0]

    def store_in(self, slot: int) -> None:
        """Store all that the layer stored in another cache slot too."""
        args, kwargs = self.rest
        if self.new:
            self.cache.update(*self.new, slot, *args, **kwargs)
        if self.new_index:
            self.cache.update_indexer(*self.new_index, slot)


class SharedRead(NaturalPresent, CacheStandIn):
    """Policy `shared`: stores nothing, and returns the keys and values of the natural pass.

    Attributes:
        read: `NaturalPass.seen`, of `past + chunk` tokens.
    """

    def __init__(self, cache, read):
        super().__init__(cache)
        self.read = read

    @property
    def layers(self):
        return super().layers if self.pools is None else OneSlot(self.pools)

    def see(self, natural: NaturalPass):
        super().see(natural).pools = natural.pools and ReplayedPools(natural.pools.answers)
        return self

    def update(self, keys, values, *args, **kwargs):
        return self.read[:2]

    def update_indexer(self, keys, layer_idx):
        return self.read[-1]


class OwnChunk(NaturalPast, CacheStandIn):
    """Policy `reference`: stores nothing, and returns the natural past joined with the iterate's own chunk.

    Attributes:
        read: `NaturalPass.seen`, of `past + chunk` tokens.
        start: position of the chunk in `read`; None if it is at the end.
    """

    def __init__(self, cache, read, start):
        super().__init__(cache)
        self.read = read
        self.start = start

    def update(self, keys, values, *args, **kwargs):
        return self._replace_chunk(self.read[0], keys), self._replace_chunk(self.read[1], values)

    def update_indexer(self, keys, layer_idx):
        return self._replace_chunk(self.read[-1], keys)

    def _replace_chunk(self, read, own):
        length = own.shape[-2]
        if self.start is None:
            return torch.cat([read[..., : read.shape[-2] - length, :], own], dim=-2)
        positions = self.start + torch.arange(length, device=read.device)
        return read.index_copy(-2, positions, own)


class OwnSlot(OwnStates, CacheStandIn):
    """Policy `per_step`: stores in the cache slot of this layer and iteration, and returns the contents of that slot.

    Attributes:
        read: `NaturalPass.seen`; the slot must have the same length.
        slot: number of the slot in the cache.
    """

    def __init__(self, cache, read, slot):
        super().__init__(cache)
        self.read = read
        self.slot = slot

    @property
    def layers(self):
        return OneSlot(super().layers[self.slot])

    def update(self, keys, values, layer_idx, *args, **kwargs):
        own = self.cache.update(keys, values, self.slot, *args, **kwargs)
        if own[0].shape[-2] != self.read[0].shape[-2]:
            raise ValueError(_foreign_cache(f"slot {self.slot} and layer {layer_idx} differ in length"))
        return own

    def update_indexer(self, keys, layer_idx):
        return self.cache.update_indexer(keys, self.slot)


def chunk_start(cache, layer_idx: int, natural: NaturalPass):
    """The position in `natural.seen` where the chunk of the natural pass starts; None if the chunk is at the end.

    Only a static cache layer can have it elsewhere: it returns a buffer longer than its contents.
    """
    if not natural.seen:
        return None
    length, read_length = (*natural.new, *natural.new_index)[0].shape[-2], natural.seen[0].shape[-2]
    layer = cache.layers[layer_idx] if hasattr(cache, "layers") else None
    if layer is None or not layer.is_compileable or read_length != layer.max_cache_len:
        return None
    last = read_length - length
    cache_kwargs = next(iter(natural.rest[0]), None)
    if cache_kwargs is not None and cache_kwargs.get("cache_position") is not None:  # transformers 4
        return cache_kwargs["cache_position"][0].clamp(max=last)
    if hasattr(layer, "cumulative_length_int"):  # a sliding window; once full, the chunk is at its end
        return min(layer.cumulative_length_int - length, last)
    return layer.cumulative_length - length


def is_empty(cache, layer_idx: int, num_tokens: int = 0) -> bool:
    """Whether the cache had nothing for this layer before this forward.

    Args:
        cache: the cache.
        layer_idx: the layer, which has stored nothing of this forward.
        num_tokens: how many tokens of this forward the layers before it have stored.
    """
    if not hasattr(cache, "layers"):  # a family's own cache class, transformers 4
        return int(cache.get_seq_length(layer_idx)) == 0
    # Layers without a memory of their own know nothing; a later one has stored nothing of this forward either.
    layer_idx = next((i for i in range(layer_idx, len(cache.layers)) if _remembers(cache.layers[i])), layer_idx)
    if layer_idx >= len(cache.layers):
        return True
    if hasattr(cache.layers[layer_idx], HAS_STATE):
        return not has_past(cache.layers[layer_idx])
    if not cache.layers[layer_idx].is_initialized:
        return True
    # A static cache has its length only as a tensor, and a compiled graph cannot branch on a tensor.
    if torch.compiler.is_compiling():
        return not hasattr(cache, FILLED_BY)
    # A layer that reuses the keys of an earlier layer has none; the earlier one has already stored this forward's.
    owners = (index for index in range(layer_idx, -1, -1) if getattr(cache.layers[index], "keys", None) is not None)
    owner = next(owners, None)
    return owner is None or int(cache.get_seq_length(owner)) == (0 if owner == layer_idx else num_tokens)


def _remembers(slot) -> bool:
    """Whether a cache slot is for a memory: keys and values, or a state."""
    return (
        hasattr(slot, HAS_STATE)
        or not getattr(slot, "is_initialized", False)
        or getattr(slot, "keys", None) is not None
    )


def add_slots(cache, spec: LoopSpec, num_layers: int, num_tokens: int = 0) -> int:
    """Add one slot for each looped layer and iteration to the cache, of the same type as the layer's own slot.

    An empty cache first loses the slots of another loop.

    A cache that was made without a config needs no call: it adds slots by itself when a layer first stores there.

    Returns:
        The number of the first extra slot.

    Raises:
        ValueError: something else filled the cache, or it is of a class that slots cannot be added to.
    """
    if type(cache).__module__.startswith("transformers.models."):  # a family's own class, with its own slots
        raise ValueError(f"kv per_step cannot add slots to a {type(cache).__name__}; use kv shared")
    _drop_slots_of_another_loop(cache, spec, num_tokens)
    if hasattr(cache, FIRST_SLOT):
        return getattr(cache, FIRST_SLOT)
    count, slots = len(cache.layers), extra_slots_of(bodies_within(spec, num_layers))
    if count >= num_layers and slots and not is_empty(cache, slots[0][0], num_tokens):
        raise ValueError(
            "kv per_step needs slots for every pass, and something without them filled this K/V cache, such as the "
            "base model or prefix tuning; start with a new cache, or use kv shared"
        )
    first = max(count, num_layers)
    setattr(cache, FIRST_SLOT, first)
    setattr(cache, SLOTS_FOR, _fingerprint(spec))
    if count >= num_layers:
        cache.layers.extend([_empty_slot_like(cache.layers[index]) for index, _ in slots])
    return first


def _drop_slots_of_another_loop(cache, spec: LoopSpec, num_tokens: int) -> None:
    """Remove slots that were added for another loop from a cache that was reset since: too few, or of other types."""
    if getattr(cache, SLOTS_FOR, None) in (None, _fingerprint(spec)) or not is_empty(cache, first_of(spec), num_tokens):
        return
    del cache.layers[getattr(cache, FIRST_SLOT) :]
    delattr(cache, FIRST_SLOT)
    delattr(cache, SLOTS_FOR)


def _empty_slot_like(layer):
    slot = copy.deepcopy(layer)
    slot.reset()
    return slot


def check_filled_by(cache, spec: LoopSpec, num_layers: int) -> None:
    """Check that a forward of a loop may go on with a cache; call it before the forward stores anything.

    Args:
        cache: the cache.
        spec: the loop of this forward.
        num_layers: the number of decoder layers that it runs.

    Raises:
        ValueError: the cache was filled under a loop that this one cannot go on from.
    """
    before, now = getattr(cache, FILLED_BY, None), _fingerprint(spec)
    if before is None or before == now or is_empty(cache, first_of(spec)):
        return
    changed = _changes_that_matter(before, now, num_layers)
    if changed:
        raise ValueError(_foreign_cache(changed))


def _changes_that_matter(before: tuple, now: tuple, num_layers: int) -> str:
    """What this loop changes that a cache of the earlier one cannot follow; empty if it can.

    Under `shared` and `reference` a token keeps the keys and values that it was computed with, so the steps, their
    sizes and the rule may change between tokens, and so may whether tokens loop at all. But layers that a path left out
    have stored nothing.
    """
    if before and now:
        matters = FIELDS if "per_step" in (before[_KV], now[_KV]) else ("span", "mode", "kv", "path")
        pairs = zip(FIELDS, before, now, strict=True)
        return ", ".join(name for name, was, value in pairs if was != value and name in matters)
    if before and (before[_KV] == "per_step" or (before[_PATH] and skipped_by(before[_PATH], num_layers))):
        return "it looped, and now steps or anchor is 1"
    return "steps or anchor was 1" if now and now[_KV] == "per_step" else ""


def mark_filled(cache, spec: LoopSpec) -> None:
    """Note in a cache the loop of the forward that stores there now."""
    if getattr(cache, FILLED_BY, None) != _fingerprint(spec):
        setattr(cache, FILLED_BY, _fingerprint(spec))


_KV, _PATH = FIELDS.index("kv"), FIELDS.index("path")


def _fingerprint(spec: LoopSpec) -> tuple:
    """The loop as a tuple of plain values; empty if it is the base model."""
    return () if spec.is_identity else tuple(getattr(spec, name) for name in FIELDS)


def _foreign_cache(why: str) -> str:
    return f"the K/V cache was filled under another loop setting ({why}); start with a new cache"
