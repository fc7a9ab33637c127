"""The native model's call of one looped layer: recorded in the natural pass, run again on other hidden states.

Every export has a copy of this file. It needs only torch.
"""

from __future__ import annotations

import inspect
from collections.abc import MutableMapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from .looped_arguments import CacheArgument, find_cache_argument, self_attention
from .looped_cache import NaturalPass, OwnChunk, OwnSlot, SharedRead, chunk_start
from .looped_checkpointing import checkpointing_paused, is_checkpointing
from .looped_pools import check_not_pooling, natural_cache
from .looped_recurrent import Mixers
from .looped_routing import RecordRoute, ReplayRoute, Routers, routing

if TYPE_CHECKING:
    from .looped_walk import Walk

# Argument of layers that hand keys and values to later layers outside of the cache (Gemma 3n and 4): a mapping.
HANDED_ON = "shared_kv_states"
# Argument of layers that may read the positions that an earlier layer's indexer chose: what that layer returned second.
CHOSEN = "prev_topk_indices"
# Argument of layers for what the layer before returned beside its hidden states (Zaya): iterations would not get it.
HANDED_OVER = "prev_router_hidden_states"


class LayerTraits(NamedTuple):
    """What the walk needs to know about a decoder layer; it holds no module, since modules may be replaced.

    Attributes:
        number, native: its number in the decoder, from 0, and its class; a wrapper around it has another class.
        cache_argument: its argument for the K/V cache; None if it has none.
        routers: the modules that choose its experts.
        mixers: the modules that keep a recurrent state.
        is_handed_over: whether it takes more from the layer before than hidden states.
    """

    number: int
    native: type
    cache_argument: CacheArgument | None
    routers: Routers
    mixers: Mixers
    is_handed_over: bool

    @classmethod
    def of(cls, number: int, layer: nn.Module) -> LayerTraits:
        """The traits of a layer that the native model has just built."""
        is_handed_over = HANDED_OVER in inspect.signature(layer.forward).parameters
        mixers = Mixers.prepared(layer)
        return cls(number, type(layer), find_cache_argument(layer), Routers.of(layer), mixers, is_handed_over)

    def native_in(self, layer: nn.Module) -> nn.Module:
        """The native layer in what the layer list holds now: itself, or inside a wrapper."""
        if isinstance(layer, self.native):
            return layer
        return next((module for module in layer.modules() if isinstance(module, self.native)), layer)


class LayerCall:
    """The native model's call of one span layer, which runs once as called and then again on other hidden states.

    Attributes:
        walk: the forward that it belongs to.
        layer, native, traits: the decoder layer as the list holds it, maybe in a wrapper, the layer itself, its traits.
        index, cache_argument: its number in the decoder, and its argument for the K/V cache.
        hidden: the hidden states of the call, `(batch, seq, hidden)`.
        output: the hidden states that the next layer should get, of the same shape.
        cache: the cache of the call, or None.
        natural: the keys, values and states that the natural pass stored and read.
        routes: for each router of the layer, by path, its answers in the natural pass; used with frozen routing.
        chosen: for each pass, the positions that the layer returned for the next one, if it has the argument `CHOSEN`.
        handed: under vLLM, what its attention layer got in the natural pass; see `looped_vllm.VllmAttention`.
        iterations: how often it has run again so far.
    """

    def __init__(self, walk: Walk, layer: Any, traits: LayerTraits, args, kwargs):
        self.walk = walk
        self.layer = layer
        self.native: Any = traits.native_in(layer)
        self.traits = traits
        self.index = traits.number
        self.cache_argument: Any = traits.cache_argument  # there is one: `DecoderLoop` refuses to loop other layers
        self.routes: dict[str, list] = {path: [] for path in traits.routers.known}
        self.args = list(args)
        self.kwargs = kwargs
        self.hidden = args[0] if args else kwargs["hidden_states"]
        self.cache = None if not traits.cache_argument else self_attention(traits.cache_argument.value_in(args, kwargs))
        self.natural = NaturalPass(None)
        self.output: Any = None
        self.chosen: dict[int, Any] = {}
        self.handed: tuple = ()
        self.iterations = 0
        if walk.spec.path is not None:
            self._check_on_path()

    def _check_on_path(self) -> None:
        """Raise ValueError if the layer hands on more than hidden states: in a detour nobody knows from which pass."""
        handed = [name for name in (HANDED_ON, CHOSEN) if name in self.kwargs]
        if handed and self.index in self.walk.runs:
            raise ValueError(
                f"layer {self.index} takes {handed[0]} from earlier layers, which a path cannot give it; use spans"
            )

    def run(self, hidden, cache, k: int = 0):
        """The layer's output for this input and cache in pass k (0: the natural one), all else as recorded."""
        args, kwargs = self._arguments(hidden, cache, k)
        output = self.layer(*args, **kwargs)
        if CHOSEN in kwargs:
            self.chosen[k] = output[1]
        return output

    def _arguments(self, hidden, cache, k: int) -> tuple[list, dict]:
        args, kwargs = list(self.args), dict(self.kwargs)
        if isinstance(kwargs.get(HANDED_ON), MutableMapping):
            kwargs[HANDED_ON] = self._handed_on(k)
        if k and CHOSEN in kwargs:
            kwargs[CHOSEN] = self._chosen_before(k)
        if args:
            args[0] = hidden
        else:
            kwargs["hidden_states"] = hidden
        self.cache_argument.put(cache, args, kwargs)
        return args, kwargs

    def _chosen_before(self, k: int):
        """The positions that the layer before this one returned in pass k; before the first, the last one's before."""
        body = self.walk.body_of(self.index)
        before, k = (self.index - 1, k) if self.index > body.hull.start else (body.after, k - 1)
        return self.walk.calls[before].chosen[k]

    def _handed_on(self, k: int) -> MutableMapping:
        """What the layers of pass k hand on to each other. Each pass has its own, since a backward pass that recomputes
        a layer has to find there what the layer found."""
        passes, original = self.walk.handed_on, self.kwargs[HANDED_ON]
        while len(passes) <= k:
            passes.append(type(original)(original))
        return passes[k]

    def hand_on(self) -> None:
        """Hand on what the last pass did, to the layers behind the body."""
        if self.walk.handed_on:
            self.kwargs[HANDED_ON].update(self.walk.handed_on[-1])

    def run_natural(self):
        """The layer's output for the call as recorded; also records what iterations need."""
        spec = self.walk.spec
        if self.walk.vllm is not None:
            return self.walk.vllm.run_natural(self)
        if not is_checkpointing(self.native):
            self.natural = NaturalPass(natural_cache(self.native, self.cache))
            self.natural.is_shared = spec.kv == "shared"
            # Without a cache, an iteration of another policy needs nothing of the natural pass.
            has_memory = self.cache is not None or spec.kv == "shared"
            with self.frozen(RecordRoute):
                output = self.run(self.hidden, self.natural if has_memory else None)
            if spec.kv == "shared":
                self.traits.mixers.check_recorded(self.natural.states)
            return output
        if spec.kv == "shared":
            self.traits.mixers.check_not_checkpointed()
            check_not_pooling(self.native)
        if spec.frozen_routing and self.routes:
            raise ValueError("frozen routing does not work with gradient checkpointing; switch one of them off")
        # Gradient checkpointing runs layers without a cache. Then only `shared` needs the natural K/V.
        self.cache = None
        return self._run_natural_checkpointed() if spec.kv == "shared" else self.run(self.hidden, None)

    def run_iteration(self, k: int, hidden):
        """The layer's output hidden states `(batch, seq, hidden)` in iteration k, counted from 1."""
        spec, vllm = self.walk.spec, self.walk.vllm
        if spec.kv == "shared" and self.natural.read and is_checkpointing(self.native):
            return self.native._gradient_checkpointing_func(partial(self._run_shared, k), hidden, *self.natural.seen)
        if vllm is not None:
            return hidden_of(vllm.run_iteration(self, hidden, k))
        cache = self._iteration_cache(k)
        with self.frozen(ReplayRoute):
            return hidden_of(self.run(hidden, cache, k))

    def frozen(self, route):
        """Let the layer's routers record or replay their answers, if the loop freezes them."""
        return routing(self.native, route, self.routes if self.walk.spec.frozen_routing else {})

    def store_natural(self) -> None:
        """Store what the natural pass stored in the slots of all iterations, for tokens that do not loop.

        Recurrent states and pools of tokens cannot be copied, since each slot has a past of its own. Each slot takes up
        the natural input of the layer instead, for which the layer has to run.
        """
        for k in range(1, self.walk.runs[self.index]):
            if self.natural.states or self.natural.pools is not None:
                self.run(self.hidden, self._iteration_cache(k), k)
            else:
                self.natural.store_in(self.walk.slot(self.index, k))

    def _iteration_cache(self, k: int):
        """The cache stand-in for iteration k, by K/V policy."""
        if self.walk.spec.kv == "shared":
            return SharedRead(self.cache, self.natural.seen).see(self.natural)
        if self.cache is None or not (self.natural.seen or self.natural.states):
            return self.cache  # no cache: the layer attends to its own K/V; nothing stored: to another layer's
        if self.walk.spec.kv == "per_step":
            return OwnSlot(self.cache, self.natural.seen, self.walk.slot(self.index, k)).see(self.natural)
        start = chunk_start(self.cache, self.index, self.natural)
        return OwnChunk(self.cache, self.natural.seen, start).see(self.natural)

    # With gradient checkpointing, the natural K/V are inputs and outputs of the checkpointed functions. So gradients
    # reach them, with reentrant and with non-reentrant checkpointing.

    def _run_natural_checkpointed(self):
        first_output = []

        def forward(hidden):
            natural = NaturalPass(None)
            with checkpointing_paused(self.native):
                output = self.run(hidden, natural)
            first_output.append(output)
            return (hidden_of(output), *natural.seen)

        hidden, *read = self.native._gradient_checkpointing_func(forward, self.hidden)
        self.natural.read = tuple(read)
        return with_hidden(first_output[0], hidden)

    def _run_shared(self, k: int, hidden, *read):
        with checkpointing_paused(self.native):
            return hidden_of(self.run(hidden, SharedRead(None, read), k))


def hidden_of(output):
    return output[0] if isinstance(output, tuple) else output


def with_hidden(output, hidden, chosen=None):
    """The output of a layer with other hidden states and, if it returns chosen positions, those of the last pass."""
    if chosen:
        return hidden, chosen[max(chosen)]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
