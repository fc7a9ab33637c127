"""One forward of the looped model: run the layers of the span once, then run them again on the iterates.

Every export has a copy of this file. It needs only torch.

The native model walks over its layer list and calls each layer. For a layer of the span, the list holds a `Visit`: it
runs the layer as called (the natural pass) and records the call as a `LayerCall`. At the end of the span (in layer
mode, after each layer), the update rule runs the recorded calls again on its iterates.
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

# Attribute that we set on a cache: the number of decode steps since the latest longer chunk, up to `first_n` + 1.
DECODE_STEPS = "loop_decode_steps"


class LayerTraits(NamedTuple):
    """What the walk needs to know about a decoder layer; it holds no module, since modules may be replaced.

    Attributes:
        number: its number in the decoder, counted from 0.
        cache_argument: its argument for the K/V cache; None if it has none.
        routers: the modules that choose its experts.
    """

    number: int
    cache_argument: CacheArgument | None
    routers: Routers

    @classmethod
    def of(cls, number: int, layer: nn.Module) -> LayerTraits:
        """The traits of a layer that the native model has just built."""
        return cls(number, find_cache_argument(layer), Routers.of(layer))


class Walk:
    """One walk of the native model over its layer list, which is one forward.

    Attributes:
        spec: the loop.
        num_layers: L, the number of decoder layers.
        vllm: a `looped_vllm.VllmSeam` if vLLM runs the model, else None.
        calls: the calls of span layers so far, by layer number, so that a recomputed call replaces the earlier one.
        loops: whether this forward loops; None until the first call of a span layer.
    """

    def __init__(self, spec: LoopSpec, num_layers: int, vllm=None):
        self.spec = spec
        self.num_layers = num_layers
        self.vllm = vllm
        self.calls: dict[int, LayerCall] = {}
        self.loops: bool | None = None

    def run(self, call: LayerCall):
        """Run the natural pass of a span layer and, if it is the last layer of a body, the iterations."""
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
        """With `per_step`, the number of a layer's cache slot for iteration k >= 1."""
        layers = self.spec.layers
        return self.num_layers + (k - 1) * len(layers) + layers.index(index)

    def _bounds(self, index: int) -> tuple[int, int]:
        """The half-open range of layers of the body that a layer belongs to."""
        if self.spec.mode == "layer":
            return index, index + 1
        return next((start, stop) for start, stop in self.spec.spans if start <= index < stop)

    def _begin(self, call: LayerCall) -> bool:
        """Prepare the cache and decide whether this forward loops; see `LoopSpec.decode`."""
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
    """Replaces a span layer in the native model's walk: calls go to the walk, attributes to the layer."""

    def __init__(self, walk: Walk, layer: nn.Module, traits: LayerTraits):
        vars(self).update(walk=walk, layer=layer, traits=traits)

    def __call__(self, *args, **kwargs):
        return self.walk.run(LayerCall(self.walk, self.layer, self.traits, args, kwargs))

    def __getattr__(self, name):
        return getattr(self.layer, name)

    def __setattr__(self, name, value):
        setattr(self.layer, name, value)


class LayerCall:
    """The native model's call of one span layer, which runs once as called and then again on other hidden states.

    Attributes:
        walk: the forward that it belongs to.
        layer: the decoder layer.
        index: its number in the decoder, counted from 0.
        cache_argument: its argument for the K/V cache.
        hidden: the hidden states of the call, `(batch, seq, hidden)`.
        cache: the cache of the call, or None.
        natural: the keys and values that the natural pass stored and read.
        routes: for each router of the layer, by path, its answers in the natural pass; used with frozen routing.
    """

    def __init__(self, walk: Walk, layer: Any, traits: LayerTraits, args, kwargs):
        assert traits.cache_argument is not None, "LoopedLayers.check refuses layers without one"
        self.walk = walk
        self.layer = layer
        self.index = traits.number
        self.cache_argument = traits.cache_argument
        self.routes: dict[str, list] = {path: [] for path in traits.routers.known}
        self.args = list(args)
        self.kwargs = kwargs
        self.hidden = args[0] if args else kwargs["hidden_states"]
        cache = traits.cache_argument.value_in(args, kwargs)
        self.cache = getattr(cache, "self_attention_cache", cache)  # in decoders that can attend to an encoder
        self.natural = NaturalPass(None)

    def run(self, hidden, cache):
        """The layer's output for these hidden states and this cache, with all other arguments as recorded."""
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
        """The layer's output for the call as recorded; also records what iterations need."""
        spec = self.walk.spec
        if not self._is_checkpointing():
            self.natural = NaturalPass(self.cache)
            with self._frozen(RecordRoute):
                return self.run(self.hidden, self.natural)
        if spec.frozen_routing and self.routes:
            raise ValueError("frozen routing does not work with gradient checkpointing; switch one of them off")
        # Gradient checkpointing runs layers without a cache. Then only `shared` needs the natural K/V.
        self.cache = None
        return self._run_natural_checkpointed() if spec.kv == "shared" else self.run(self.hidden, None)

    def run_iteration(self, k: int, hidden):
        """The layer's output hidden states `(batch, seq, hidden)` in iteration k, counted from 1."""
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
        """Store the natural keys and values in the slots of all iterations, for tokens that do not loop."""
        if not self.natural.new:
            return
        for k in range(1, self.walk.spec.evaluations):
            args, kwargs = self.natural.rest
            self.cache.update(*self.natural.new, self.walk.slot(self.index, k), *args, **kwargs)

    def _iteration_cache(self, k: int):
        """The cache stand-in for iteration k, by K/V policy."""
        if self.walk.spec.kv == "shared":
            return SharedRead(self.cache, self.natural.read)
        if self.cache is None or not self.natural.new:
            return self.cache  # no cache: the layer attends to its own K/V; nothing stored: to another layer's
        if self.walk.spec.kv == "per_step":
            return OwnSlot(self.cache, self.natural.read, self.walk.slot(self.index, k))
        return OwnChunk(self.cache, self.natural.read, chunk_start(self.cache, self.index, self.natural))

    # With gradient checkpointing, the natural K/V are inputs and outputs of the checkpointed functions. So gradients
    # reach them, with reentrant and with non-reentrant checkpointing.

    def _is_checkpointing(self) -> bool:
        layer = self.layer
        # Since transformers 5.24, a training layer keeps its cache and does not checkpoint if gradients are off.
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
    """g for one span (in layer mode, one layer) in one forward: each call runs the recorded layers once more.

    The first call runs nothing: it returns the result of the natural pass, which the native model has already run.

    Attributes:
        calls: the recorded calls of the layers, in order.
        natural_outputs: each layer's output in the natural pass, `(batch, seq, hidden)`.
    """

    def __init__(self, calls: list[LayerCall], natural):
        self.calls = calls
        self.natural_outputs = [call.hidden for call in calls[1:]] + [natural]
        self.count = 0

    @property
    def natural(self):
        """n, the output of the natural pass, `(batch, seq, hidden)`."""
        return self.natural_outputs[-1]

    def __call__(self, hidden, replace=None):
        """g(hidden), `(batch, seq, hidden)`; `replace(position, output)`, if given, replaces each layer's output."""
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
