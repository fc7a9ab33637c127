"""One forward of the looped model in MLX: the natural pass of each layer of the loop, then the iterations.

Every export has a copy of this file. It needs only mlx.

As with torch, the native decoder walks over its layers and finds a `Visit` for a layer of the loop. The visit runs the
layer as called and records the call; after the last layer of a body, the update rule runs the recorded calls again.
Modules hold no state of a forward, since threads share them: what a forward changes, it changes in a `twin`.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from itertools import pairwise
from typing import Any, NamedTuple

from .looped_mlx_limits import not_on_mlx
from .looped_mlx_routing import RecordRoute, ReplayRoute
from .looped_path import BodySpec, runs_of
from .looped_rules import run_loop
from .looped_spec import FIELDS, LoopSpec, bodies_within

# No statement: transformers, which copies this file too, demands whatever an import statement names.
mx = import_module("mlx.core")

# Attribute that we set on the caches of layers: the loop that filled them, as `_fingerprint` gives it.
FILLED_BY = "looped_by"


class Argument(NamedTuple):
    """An argument of a call: its name, and its position behind `self`."""

    name: str
    position: int

    @classmethod
    def of(cls, module_class: type, name: str | None = None) -> Argument:
        """The argument of this name that a module is called with, or the first one."""
        names = list(inspect.signature(module_class.__call__).parameters)[1:]
        if (name or names[0]) not in names:
            raise ValueError(not_on_mlx(f"{module_class.__name__} has no argument {name}"))
        return cls(name or names[0], names.index(name or names[0]))

    def value_in(self, args, kwargs):
        """Its value in a call, or None."""
        return kwargs.get(self.name, args[self.position] if self.position < len(args) else None)

    def put(self, value, args, kwargs) -> tuple[tuple, dict]:
        """The arguments of a call with another value."""
        if self.position < len(args):
            return (*args[: self.position], value, *args[self.position + 1 :]), kwargs
        return args, {**kwargs, self.name: value}


def visited_layers(spec: LoopSpec, num_layers: int) -> tuple[int, ...]:
    """The layers in whose place the decoder finds a `Visit`: those that loop, or all of them along a path."""
    return tuple(range(num_layers)) if spec.path is not None else spec.layers


class Loop(NamedTuple):
    """What every forward of a model needs.

    Attributes:
        spec: the loop.
        layers: the name of the decoder's list of layers.
        num_slots: how many caches the native model has.
        cache: the decoder's argument for them.
        num_layers: how many layers it has.
        arguments: each visited layer's arguments for its hidden states and its cache, by number.
        routers: with frozen routing, the paths of each looped layer's routers, by number.
    """

    spec: LoopSpec
    layers: str
    num_slots: int
    num_layers: int
    cache: Argument
    arguments: dict[int, tuple[Argument, Argument]]
    routers: dict[int, tuple[str, ...]]


class Walk:
    """One walk of the native decoder over its layers, which is one forward.

    Attributes:
        loop: the loop.
        natural_slots: the caches of the natural pass, or None.
        own_slots: with `per_step`, the caches of the iterations, by layer and k; empty without a cache.
        bodies: what loops, by the layer after which it does.
        runs: how many times each looped layer runs.
        calls: the calls of visited layers so far, by number.
    """

    def __init__(self, loop: Loop, cache):
        keys = loop.spec.extra_slots
        if cache is not None and all(slot is None for slot in cache):
            cache = None
        if cache is not None and len(cache) != loop.num_slots + len(keys):
            raise ValueError(
                f"the cache has {len(cache)} slots, and this loop needs {loop.num_slots + len(keys)}; make it with "
                "mlx_lm.models.cache.make_prompt_cache"
            )
        _mark_filled([slot for slot in cache or () if slot is not None], loop.spec)
        self.loop = loop
        self.natural_slots = None if cache is None else cache[: loop.num_slots]
        self.own_slots = {} if cache is None else dict(zip(keys, cache[loop.num_slots :], strict=True))
        self.bodies = {body.after: body for body in bodies_within(loop.spec, loop.num_layers)}
        self.runs = runs_of(self.bodies.values())
        self.calls: dict[int, LayerCall] = {}

    def visits(self, layers: list) -> list:
        """What the native decoder walks over."""
        visited = visited_layers(self.loop.spec, len(layers))
        return [Visit(self, index, layer) if index in visited else layer for index, layer in enumerate(layers)]

    def run(self, call: LayerCall):
        """Run the natural pass of a layer and, if a body runs again after it, its iterations."""
        self.calls[call.index] = call
        call.output = call.run_natural()
        if not isinstance(call.output, mx.array):
            raise ValueError(not_on_mlx(f"layer {call.index} returns more than hidden states"))
        if call.index in self.bodies:
            call.output = self._run_iterations(self.bodies[call.index], call.output)
        return call.output

    def _run_iterations(self, body: BodySpec, natural):
        """The hidden states after the iterations of a body."""
        calls = [self.calls[index] for index in body.layers]
        passed = [self.calls[index] for index in body.hull]
        return run_loop(calls[0].hidden, Body(body, calls, passed, natural), self.loop.spec)

    def check_complete(self) -> None:
        """Raise ValueError unless the native decoder ran every looped layer; else the result would be the base's."""
        missing = sorted(self.runs.keys() - self.calls.keys())
        if missing:
            raise ValueError(not_on_mlx(f"its decoder did not run layer {missing[0]} through its list of layers"))


class Visit:
    """Stands for a looped layer in the decoder's list: calls go to the walk, attributes to the layer."""

    def __init__(self, walk: Walk, index: int, layer: Any):
        self._walk = walk
        self._index = index
        self._layer = layer

    def __call__(self, *args, **kwargs):
        return self._walk.run(LayerCall(self._walk, self._index, self._layer, args, kwargs))

    def __getattr__(self, name):
        return getattr(self._layer, name)


class LayerCall:
    """The native decoder's call of one layer, which runs once as called and then again on other hidden states.

    Attributes:
        index: the layer's number.
        hidden: the hidden states of the call, `(batch, seq, hidden)`.
        output: the hidden states that the next layer should get, of the same shape.
        iterations: how often it has run again so far.
    """

    def __init__(self, walk: Walk, index: int, layer: Any, args: tuple, kwargs: dict):
        hidden, cache = walk.loop.arguments[index]
        self.index = index
        self.hidden = hidden.value_in(args, kwargs)
        self.output: Any = None
        self.iterations = 0
        self._walk = walk
        self._layer = layer
        self._arguments = args, kwargs
        self._cache = cache.value_in(args, kwargs)
        is_read_again = walk.loop.spec.kv == "shared" and index in walk.runs
        self._natural = NaturalPass(self._cache) if is_read_again else None
        self._answers: dict[str, list] = {path: [] for path in walk.loop.routers.get(index, ())}

    def run_natural(self):
        """The layer's output for the call as it is; also records what iterations need."""
        if self._natural is None:
            return self._run(self.hidden, self._cache, RecordRoute)
        output = self._run(self.hidden, self._natural, RecordRoute)
        self._natural.check(self.index)
        return output

    def run_iteration(self, k: int, hidden):
        """The layer's output in iteration k, counted from 1."""
        cache = self._walk.own_slots.get((self.index, k)) if self._natural is None else SharedRead(self._natural)
        return self._run(hidden, cache, ReplayRoute)

    def _run(self, hidden, cache, route: type[RecordRoute]):
        args, kwargs = self._arguments
        for argument, value in zip(self._walk.loop.arguments[self.index], (hidden, cache), strict=True):
            args, kwargs = argument.put(value, args, kwargs)
        layer, routes = self._layer, {}
        for path, answers in self._answers.items():
            routes[path] = route(_at(self._layer, path), answers)
            layer = _replaced(layer, path, routes[path])
        output = layer(*args, **kwargs)
        for path, each in routes.items():
            each.check(path)
        return output


class NaturalPass:
    """Stands for the cache in the natural pass under `shared`: stores in it, and records what the layer then reads.

    Attributes:
        cache: the cache; None if there is none.
        start: how many tokens it held before this forward, as a number or for each row.
        seen: the keys and values that the layer attended to.
        count: how often the layer stored something.
    """

    def __init__(self, cache):
        self.cache = cache
        self.start = 0 if cache is None else _copy(cache.offset)
        self.seen: tuple = ()
        self.count = 0

    @property
    def offset(self):
        """The offset of the cache, which grows when the layer stores its keys and values."""
        return 0 if self.cache is None else self.cache.offset

    def update_and_fetch(self, keys, values):
        self.count += 1
        self.seen = (keys, values) if self.cache is None else self.cache.update_and_fetch(keys, values)
        return self.seen

    def check(self, index: int) -> None:
        """Raise ValueError unless the layer stored its own keys and values once."""
        if self.count != 1:
            raise ValueError(not_on_mlx(f"layer {index} stored keys and values {self.count} times, not once"))

    def __getattr__(self, name):
        return getattr(self.cache, name)


class SharedRead:
    """Stands for the cache in an iteration under `shared`: stores nothing, answers with the natural keys and values.

    Attributes:
        offset: that of the natural pass, before and after it stored its keys and values.
    """

    def __init__(self, natural: NaturalPass):
        self._natural = natural
        self.offset = natural.start

    def update_and_fetch(self, keys, values):
        self.offset = self._natural.offset
        return self._natural.seen

    def __getattr__(self, name):
        return getattr(self._natural.cache, name)


class Body:
    """g for one body in one forward, as the update rules call it; see `looped_body.Body`, the same for torch."""

    def __init__(self, spec: BodySpec, calls: list[LayerCall], passed: list[LayerCall], natural):
        for before, after in pairwise(passed):
            if after.hidden is not before.output:
                raise ValueError(
                    f"the model changes the hidden states between layers {before.index} and {after.index}, inside a "
                    "span; choose a span on one side of the change, or mode layer"
                )
        self.steps = spec.steps
        self.step_size = spec.step_size
        self.natural_outputs = [call.hidden for call in calls[1:]] + [natural]
        self._calls = calls
        self._has_begun = False

    @property
    def natural(self):
        """n, the output of the natural pass, `(batch, seq, hidden)`."""
        return self.natural_outputs[-1]

    def __call__(self, hidden, replace=None):
        """g(hidden), `(batch, seq, hidden)`; `replace(position, output)`, if given, replaces each layer's output."""
        if not self._has_begun:
            self._has_begun = True
            return self.natural
        for position, call in enumerate(self._calls):
            call.iterations += 1
            hidden = call.run_iteration(call.iterations, hidden)
            hidden = hidden if replace is None else replace(position, hidden)
        return hidden

    def placed(self, hidden):
        """Hidden states where the body runs: in MLX, all memory is one."""
        return hidden

    @staticmethod
    def norm(hidden):
        """L2 norm of each token's hidden state in fp32, `(batch, seq, 1)`."""
        return mx.maximum(mx.linalg.norm(hidden.astype(mx.float32), axis=-1, keepdims=True), 1e-6)

    @staticmethod
    def rescale(hidden, norm):
        """Scale each token to a norm, in fp32."""
        return (hidden.astype(mx.float32) * (norm / Body.norm(hidden))).astype(hidden.dtype)


def twin(module: Any, changes: dict, twin_class: Any = None) -> Any:
    """A copy of a module that shares everything but `changes`, by name, and may be of another class."""
    twin_class = twin_class or type(module)
    copy: Any = twin_class.__new__(twin_class)
    vars(copy).update(vars(module))
    dict.update(copy, module)
    dict.update(copy, changes)
    return copy


def _at(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = module[name]
    return module


def _replaced(module: Any, path: str, value: Any) -> Any:
    """A twin of a module with another value at a path."""
    name, _, rest = path.partition(".")
    return twin(module, {name: _replaced(module[name], rest, value) if rest else value})


def _mark_filled(cache, spec: LoopSpec) -> None:
    """Note in caches which loop fills them now.

    A cache from a file has no such note, nor one that mlx-lm made of others, for a batch or with fewer bits.

    Raises:
        ValueError: another loop filled them.
    """
    now = _fingerprint(spec)
    for slot in cache:
        before = getattr(slot, FILLED_BY, now)
        if before != now and not slot.empty():
            names = [name for name in now.keys() | before.keys() if now.get(name) != before.get(name)]
            raise ValueError(
                f"the cache was filled under another loop setting ({', '.join(sorted(names))}); make a new one with "
                "mlx_lm.models.cache.make_prompt_cache"
            )
    for slot in cache:
        setattr(slot, FILLED_BY, now)


def _fingerprint(spec: LoopSpec) -> dict:
    """What has to stay the same while a cache is in use.

    Under `shared` a token keeps the keys and values that it was computed with, so the steps, their sizes and the rule
    may change between tokens.
    """
    names = ("span", "mode", "kv", "path") if spec.kv == "shared" else FIELDS
    return {name: getattr(spec, name) for name in names}


def _copy(offset):
    """An offset that no later update changes: those of batches are arrays."""
    return mx.array(offset) if isinstance(offset, mx.array) else offset
