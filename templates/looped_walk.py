"""One forward of the looped model: run the layers of the span once, then run them again on the iterates.

Every export has a copy of this file. It needs only torch.

The native model walks over its layer list and calls each layer. For a layer of the span, the list holds a `Visit`: it
runs the layer as called (the natural pass) and records the call as a `LayerCall`. At the end of the span (in layer
mode, after each layer), the update rule runs the recorded calls again on its iterates. Modules hold no state of a call,
since threads share them.
"""

from __future__ import annotations

import inspect
from collections.abc import MutableMapping
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from .looped_arguments import CacheArgument, find_cache_argument, self_attention
from .looped_body import Body
from .looped_cache import (
    NaturalPass,
    OwnChunk,
    OwnSlot,
    SharedRead,
    add_slots,
    chunk_start,
    is_empty,
    mark_filled,
)
from .looped_checkpointing import checkpointing_paused, is_checkpointing
from .looped_path import BodySpec, extra_slots_of, runs_of
from .looped_pools import check_not_pooling, natural_cache
from .looped_recurrent import Mixers
from .looped_routing import RecordRoute, ReplayRoute, Routers, routing
from .looped_rules import run_loop
from .looped_spec import LoopSpec, bodies_within

# Attribute that we set on a cache: the number of decode steps since the latest longer chunk, up to `first_n` + 1.
DECODE_STEPS = "loop_decode_steps"
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


class Walk:
    """One walk of the native model over its layer list, which is one forward.

    Attributes:
        spec, traits: the loop, and the traits of all decoder layers.
        num_layers: the number of decoder layers that this forward runs.
        vllm: a `looped_vllm.VllmSeam` if vLLM runs the model, else None.
        num_tokens: the number of tokens of this forward; None if it is unknown.
        bodies: what this forward loops, by the layer after which it does: what ends within its layers.
        runs: how many times each looped layer runs.
        skipped: the layers that a path leaves out.
        slots: with `per_step`, the number of each extra slot, from 0, by layer and iteration.
        calls: the calls of visited layers so far, by layer number, so that a recomputed call replaces the earlier one.
        output: what the latest visited layer returned.
        handed_on: for each pass of the current body, what its layers hand on outside of the cache.
        loops: whether this forward loops; None until the first call of a span layer.
        first_slot: with `per_step`, the number of the first extra slot in the cache.
    """

    def __init__(self, spec: LoopSpec, num_layers: int, traits: list[LayerTraits], vllm=None, num_tokens=None):
        self.spec = spec
        self.num_layers = num_layers
        self.traits = traits
        self.vllm = vllm
        self.num_tokens = num_tokens
        self.bodies = {body.after: body for body in bodies_within(spec, num_layers)}
        self.runs = runs_of(self.bodies.values())
        self.skipped = spec.skipped(num_layers)
        self.slots = {pair: number for number, pair in enumerate(extra_slots_of(self.bodies.values()))}
        self.calls: dict[int, LayerCall] = {}
        self.output: Any = None
        self.handed_on: list = []
        self.loops: bool | None = None
        self.first_slot = num_layers
        self._due: set[int] | None = None  # None until the native forward has read its layer list
        self._seen: set[int] = set()

    def visit(self, layers: nn.ModuleList) -> list:
        """What the native forward walks over: visits for what loops, and for a path, and the other layers themselves.

        Raises:
            ValueError: the stages of a pipeline cut what loops as one function.
        """
        visited: list = list(layers)
        held = {index for index in range(self.num_layers) if not isinstance(visited[index], nn.Identity)}
        for body in self.bodies.values():
            if 0 < len(held.intersection(body.hull)) < len(body.hull):
                raise ValueError(
                    f"span {body.hull.start}:{body.hull.stop} crosses pipeline stages, which block mode cannot loop; "
                    "choose a span inside one stage, or mode layer"
                )
        self._due = held.intersection(self.runs if self.spec.path is None else range(self.num_layers))
        for index in self._due:
            visited[index] = Visit(self, visited[index], self.traits[index])
        return visited

    def check_complete(self, decoder: str) -> None:
        """Raise ValueError unless the native forward ran every looped layer; else the result would be the base's."""
        missing = sorted({*self.runs, *self.skipped}) if self._due is None else sorted(self._due - self._seen)
        if missing:
            raise ValueError(
                f"{decoder} did not run layer {missing[0]} through its layer list, so the loop did not run; this "
                "release of transformers walks its layers in an untested way: use another one, or set loop_steps to 1"
            )

    def run(self, call: LayerCall):
        """Run the natural pass of a layer and, if a body runs again after it, the iterations."""
        self._seen.add(call.index)
        self.calls[call.index] = call
        if call.index in self.skipped:
            call.output = call.hidden
            return _with_hidden(self.output, call.hidden)
        if self.loops is None and (call.index in self.runs or self.skipped):
            self.loops = self._begin(call)
        self.output = self._run_natural(call)
        if self.loops and call.index in self.bodies:
            self.output = self._run_iterations(self.bodies[call.index])
        call.output = _hidden_of(self.output)
        return self.output

    def _run_natural(self, call: LayerCall):
        """Run the natural pass of a layer."""
        if call.index not in self.runs or not (self.loops or self.spec.kv == "per_step"):
            return call.layer(*call.args, **call.kwargs)
        body = self.body_of(call.index)
        if call.index == body.hull.start:
            self.handed_on = []
        output = call.run_natural()
        if not self.loops and call.cache is not None:
            call.store_natural()
            if call.index == body.after:
                call.hand_on()
        return output

    def _run_iterations(self, body: BodySpec):
        """Run the iterations of a body; returns what the latest layer returned, with other hidden states."""
        calls = [self.calls[index] for index in body.layers]
        passed = [self.calls[index] for index in body.hull]
        g = Body(body, calls, passed, _hidden_of(self.output))
        loop = run_loop if self.vllm is None else self.vllm.run_loop
        hidden = loop(calls[0].hidden, g, self.spec)
        calls[-1].hand_on()
        return _with_hidden(self.output, hidden, calls[-1].chosen)

    def slot(self, index: int, k: int) -> int:
        """With `per_step`, the number of a layer's cache slot for iteration k >= 1."""
        return self.first_slot + self.slots[index, k]

    def body_of(self, index: int) -> BodySpec:
        """The first body in which a layer runs again."""
        return next(body for body in self.bodies.values() if index in body.layers)

    def _begin(self, call: LayerCall) -> bool:
        """Prepare the cache and decide whether this forward loops; see `LoopSpec.decode`."""
        spec, cache = self.spec, call.cache
        num_tokens = call.hidden.shape[-2] if self.num_tokens is None else self.num_tokens
        if cache is None:
            return True
        if spec.kv == "per_step":
            self.first_slot = add_slots(cache, spec, self.num_layers, num_tokens)
        is_prompt = num_tokens > 1 or (spec.decode != "full" and is_empty(cache, call.index, num_tokens))
        mark_filled(cache, spec)
        if spec.decode == "full":
            return True
        step = 0 if is_prompt else min(getattr(cache, DECODE_STEPS, 0) + 1, spec.first_n + 1)
        setattr(cache, DECODE_STEPS, step)
        return is_prompt or (spec.decode == "first_n" and step <= spec.first_n)


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
            return _hidden_of(vllm.run_iteration(self, hidden, k))
        cache = self._iteration_cache(k)
        with self.frozen(ReplayRoute):
            return _hidden_of(self.run(hidden, cache, k))

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
            return (_hidden_of(output), *natural.seen)

        hidden, *read = self.native._gradient_checkpointing_func(forward, self.hidden)
        self.natural.read = tuple(read)
        return _with_hidden(first_output[0], hidden)

    def _run_shared(self, k: int, hidden, *read):
        with checkpointing_paused(self.native):
            return _hidden_of(self.run(hidden, SharedRead(None, read), k))


def _hidden_of(output):
    return output[0] if isinstance(output, tuple) else output


def _with_hidden(output, hidden, chosen=None):
    """The output of a layer with other hidden states and, if it returns chosen positions, those of the last pass."""
    if chosen:
        return hidden, chosen[max(chosen)]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
