"""One forward of the looped model: calls of span layers, run as asked first, then again on the iterates.

Copied byte for byte into every exported directory; it needs torch alone.

The native model walks its layer list. Outside the span it meets the layers themselves. Inside, it meets a `Visit`,
which runs the layer as asked (the natural pass) and records the call as a `LayerCall`. At the end of the span (or of
each layer, in layer mode) the recorded calls are replayed on the iterates of the update rule.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from .looped_cache import (
    CacheArgument,
    CacheStandIn,
    NaturalPass,
    OwnChunk,
    OwnSlot,
    SharedRead,
    add_slots,
    chunk_start,
    find_cache_argument,
    is_empty,
)
from .looped_routing import RecordRoute, ReplayRoute, Routers, routing
from .looped_rules import run_loop
from .looped_spec import LoopSpec

# Attribute that we set on a cache: decode steps since its latest longer chunk, counted as far as `first_n`.
DECODE_STEPS = "loop_decode_steps"


class LayerTraits(NamedTuple):
    """What the walk needs to know of a decoder layer besides the module, which others may replace.

    Attributes:
        number: its number in the decoder, counted from 0.
        cache_argument: the argument in which it takes the K/V cache; None where it takes none.
        routers: how its tokens' experts are chosen.
    """

    number: int
    cache_argument: CacheArgument | None
    routers: Routers

    @classmethod
    def of(cls, number: int, layer: nn.Module) -> LayerTraits:
        """The traits of a layer as the native model built it."""
        return cls(number, find_cache_argument(layer), Routers.of(layer))


class Walk:
    """One walk of the native model over its layer list, that is, one forward.

    Attributes:
        spec: the loop.
        num_layers: L, the number of decoder layers.
        vllm: a `looped_vllm.VllmSeam` where vLLM runs the model, else None.
        calls: the span layers called so far, by number, so that a recomputed call replaces itself.
        loops: whether this forward loops; None until the first span layer is called.
    """

    def __init__(self, spec: LoopSpec, num_layers: int, vllm=None):
        self.spec = spec
        self.num_layers = num_layers
        self.vllm = vllm
        self.calls: dict[int, LayerCall] = {}
        self.loops: bool | None = None

    def run(self, call: LayerCall):
        """Run the natural pass of a span layer and, where the loop's body ends with it, the iterations."""
        if self.loops is None:
            self.loops = self._begin(call)
        if not (self.loops or self.spec.kv == "per_step"):
            return call.run(call.hidden, call.cache)
        output = call.run_natural()
        self.calls[call.index] = call
        if not self.loops:
            if call.cache is not None:
                call.store_natural()
            return output
        start, stop = self._bounds(call.index)
        if call.index != stop - 1:
            return output
        body = Body([self.calls[index] for index in range(start, stop)], _hidden_of(output))
        return _with_hidden(output, run_loop(body.calls[0].hidden, body, self.spec))

    def slot(self, index: int, k: int) -> int:
        """Number of the cache slot of a layer in iteration k >= 1, under `per_step`."""
        layers = self.spec.layers
        return self.num_layers + (k - 1) * len(layers) + layers.index(index)

    def _bounds(self, index: int) -> tuple[int, int]:
        """First layer and end of the body that a layer belongs to."""
        if self.spec.mode == "layer":
            return index, index + 1
        return next((start, stop) for start, stop in self.spec.spans if start <= index < stop)

    def _begin(self, call: LayerCall) -> bool:
        """Prepare the cache and decide whether this forward loops, see `LoopSpec.decode`."""
        spec, cache, num_tokens = self.spec, call.cache, call.hidden.shape[-2]
        if cache is None:
            return True
        if spec.kv == "per_step":
            add_slots(cache, spec, self.num_layers, num_tokens)
        if spec.decode == "full":
            return True
        if num_tokens > 1 or is_empty(cache, call.index, num_tokens):
            setattr(cache, DECODE_STEPS, 0)
            return True
        if spec.decode == "bypass":
            return False
        step = min(getattr(cache, DECODE_STEPS, 0) + 1, spec.first_n + 1)
        setattr(cache, DECODE_STEPS, step)
        return step <= spec.first_n


class Visit:
    """What the native model meets in place of a span layer: calls go to the walk, attributes to the layer."""

    def __init__(self, walk: Walk, layer: nn.Module, traits: LayerTraits):
        vars(self).update(walk=walk, layer=layer, traits=traits)

    def __call__(self, *args, **kwargs):
        return self.walk.run(LayerCall(self.walk, self.layer, self.traits, args, kwargs))

    def __getattr__(self, name):
        return getattr(self.layer, name)

    def __setattr__(self, name, value):
        setattr(self.layer, name, value)


class LayerCall:
    """A call of one span layer by the native model: run as asked first, then again on other hidden states.

    Attributes:
        walk: the forward that it belongs to.
        layer, index: the module, and its number in the decoder.
        cache_argument: the argument in which it takes the cache.
        hidden: the hidden states it was called with, `(batch, seq, hidden)`.
        cache: the cache it was called with, or None.
        natural: the keys and values that the natural pass stored and read, once it has run.
        routes: by path of each router in the layer, its answers in the natural pass, if routing is frozen.
    """

    def __init__(self, walk: Walk, layer: Any, traits: LayerTraits, args, kwargs):
        assert traits.cache_argument is not None, "LoopedLayers.check has refused layers without one"
        self.walk = walk
        self.layer = layer
        self.index = traits.number
        self.cache_argument = traits.cache_argument
        self.routes: dict[str, list] = {path: [] for path in traits.routers.known}
        self.args = list(args)
        self.kwargs = kwargs
        self.hidden = args[0] if args else kwargs["hidden_states"]
        cache = traits.cache_argument.value_in(args, kwargs)
        self.cache = getattr(cache, "self_attention_cache", cache)  # what a decoder with room for an encoder has
        self.natural = NaturalPass(None)

    def run(self, hidden, cache):
        """The layer's output for other hidden states and another cache; all other arguments as recorded."""
        args, kwargs = self._arguments(hidden, cache)
        return self.layer(*args, **kwargs)

    def _arguments(self, hidden, cache) -> tuple[list, dict]:
        args, kwargs = list(self.args), dict(self.kwargs)
        if args:
            args[0] = hidden
        else:
            kwargs["hidden_states"] = hidden
        self.cache_argument.put(cache, args, kwargs)
        return args, kwargs

    def run_natural(self):
        """The layer's output as the native model asked for it; keeps what iterations need of it."""
        spec = self.walk.spec
        if not self._is_checkpointing():
            self.natural = NaturalPass(self.cache)
            with self._frozen(RecordRoute):
                return self.run(self.hidden, self.natural)
        if spec.frozen_routing and self.routes:
            raise ValueError("frozen routing does not work under gradient checkpointing; switch one of them off")
        # Gradient checkpointing takes the cache from a layer; without one, only `shared` needs the natural K/V.
        self.cache = None
        return self._run_natural_checkpointed() if spec.kv == "shared" else self.run(self.hidden, None)

    def run_iteration(self, k: int, hidden):
        """The hidden states `(batch, seq, hidden)` after this layer in iteration k, counted from 1."""
        spec, vllm = self.walk.spec, self.walk.vllm
        if spec.kv == "shared" and self._is_checkpointing():
            return self.layer._gradient_checkpointing_func(self._run_shared, hidden, *self.natural.read)
        if vllm is not None:
            slot = self.walk.slot(self.index, k) if spec.kv == "per_step" else None
            return _hidden_of(vllm.run(self.layer, self.index, slot, *self._arguments(hidden, self.cache)))
        cache = self._iteration_cache(k)
        if isinstance(cache, CacheStandIn):
            cache.length = self.natural.length
        with self._frozen(ReplayRoute):
            return _hidden_of(self.run(hidden, cache))

    def _frozen(self, stand_in):
        return routing(self.layer, stand_in, self.routes if self.walk.spec.frozen_routing else {})

    def store_natural(self) -> None:
        """Fill the slots of all passes with the natural keys and values: those of a token that does not loop."""
        if not self.natural.new:
            return
        for k in range(1, self.walk.spec.evaluations):
            args, kwargs = self.natural.rest
            self.cache.update(*self.natural.new, self.walk.slot(self.index, k), *args, **kwargs)

    def _iteration_cache(self, k: int):
        """What iteration k is handed in place of the cache, by K/V policy."""
        if self.walk.spec.kv == "shared":
            return SharedRead(self.cache, self.natural.read)
        if self.cache is None or not self.natural.new:
            return self.cache  # a layer without cache attends to its own K/V, one that stores none to another layer's
        if self.walk.spec.kv == "per_step":
            return OwnSlot(self.cache, self.natural.read, self.walk.slot(self.index, k))
        return OwnChunk(self.cache, self.natural.read, chunk_start(self.cache, self.index, self.natural))

    # Under gradient checkpointing the natural K/V travel as inputs and outputs of the checkpointed functions, so that
    # gradients reach them, reentrant or not.

    def _is_checkpointing(self) -> bool:
        layer = self.layer
        # Since 5.24, a layer in training mode keeps its cache where no gradients are wanted, and checkpoints nothing.
        pauses_itself = hasattr(layer, "_can_checkpoint_with_cache") and not torch.is_grad_enabled()
        return layer.training and getattr(layer, "gradient_checkpointing", False) and not pauses_itself

    def _run_natural_checkpointed(self):
        first_output = []

        def forward(hidden):
            natural = NaturalPass(None)
            with _checkpointing_paused(self.layer):
                output = self.run(hidden, natural)
            first_output.append(output)
            return (_hidden_of(output), *natural.read)

        hidden, *read = self.layer._gradient_checkpointing_func(forward, self.hidden)
        self.natural.read = tuple(read)
        return _with_hidden(first_output[0], hidden)

    def _run_shared(self, hidden, keys, values):
        with _checkpointing_paused(self.layer):
            return _hidden_of(self.run(hidden, SharedRead(None, (keys, values))))


class Body:
    """g for one span (or, in layer mode, one layer) of one forward: each call runs the recorded layers once more.

    The first call is the natural pass, which the native model has already run; it returns that.

    Attributes:
        calls: of the layers, in order.
        natural_outputs: each layer's hidden states in the natural pass, `(batch, seq, hidden)`.
    """

    def __init__(self, calls: list[LayerCall], natural):
        self.calls = calls
        self.natural_outputs = [call.hidden for call in calls[1:]] + [natural]
        self.count = 0

    @property
    def natural(self):
        """n, the hidden states after the natural pass."""
        return self.natural_outputs[-1]

    def __call__(self, hidden, replace=None):
        """The hidden states after the body; `replace(position, output)` may change each layer's output on the way."""
        self.count += 1
        if self.count == 1:
            return self.natural
        for position, call in enumerate(self.calls):
            hidden = call.run_iteration(self.count - 1, hidden)
            hidden = hidden if replace is None else replace(position, hidden)
        return hidden


@contextmanager
def _checkpointing_paused(layer):
    layer.gradient_checkpointing = False
    try:
        yield
    finally:
        layer.gradient_checkpointing = True


def _hidden_of(output):
    return output[0] if isinstance(output, tuple) else output


def _with_hidden(output, hidden):
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
