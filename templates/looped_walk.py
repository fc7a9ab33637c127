"""One forward of the looped model: run the layers of the span once, then run them again on the iterates.

Every export has a copy of this file. It needs only torch.

The native model walks over its layer list and calls each layer. For a layer of the span, the list holds a `Visit`: it
runs the layer as called (the natural pass) and records the call as a `LayerCall`. At the end of the span (in layer
mode, after each layer), the update rule runs the recorded calls again on its iterates. Modules hold no state of a call,
since threads share them.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .looped_body import Body
from .looped_cache import add_slots, is_empty, mark_filled
from .looped_call import LayerCall, LayerTraits, hidden_of, with_hidden
from .looped_path import BodySpec, extra_slots_of, runs_of
from .looped_rules import run_loop
from .looped_spec import LoopSpec, bodies_within

# Attribute that we set on a cache: the number of decode steps since the latest longer chunk, up to `first_n` + 1.
DECODE_STEPS = "loop_decode_steps"


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
        slots = extra_slots_of(self.bodies.values()) if spec.kv == "per_step" else ()
        self.slots = {pair: number for number, pair in enumerate(slots)}
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
                    f"layers {body.hull.start} to {body.after} loop together and are cut by pipeline stages; choose a "
                    "span inside one stage, or mode layer"
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
            return with_hidden(self.output, call.hidden)
        if self.loops is None and (call.index in self.runs or self.skipped):
            self.loops = self._begin(call)
        self.output = self._run_natural(call)
        if self.loops and call.index in self.bodies:
            self.output = self._run_iterations(self.bodies[call.index])
        call.output = hidden_of(self.output)
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
        g = Body(body, calls, passed, hidden_of(self.output))
        loop = run_loop if self.vllm is None else self.vllm.run_loop
        hidden = loop(calls[0].hidden, g, self.spec)
        calls[-1].hand_on()
        return with_hidden(self.output, hidden, calls[-1].chosen)

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
