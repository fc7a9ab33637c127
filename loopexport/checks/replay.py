"""The loop by hand over the native model: what `verify` compares an export with. It uses no code of the templates.

`looped_by_hand` hooks into the layers of a native model. Every layer of the span runs as the native model calls it (the
natural pass), and a hook records the call. After the last layer of a span (in layer mode, after each layer), a hook
calls the recorded layers again by hand and replaces the output. Keys and values that iteration k attends to:

    policy      earlier tokens                    tokens of this forward
    shared      natural                           natural
    per_step    of iteration k at that time       its own
    reference   natural                           its own

An earlier token that skipped the loop has its natural keys and values in every iteration. `replay_states` does the same
for layers that remember more than keys and values.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any

import torch

from loopexport.loop.spec import LoopSpec

from .effect import decoder_layers
from .replay_bodies import detours_of, runs_of, skip_layer, spans_of
from .replay_rules import by_hand
from .replay_states import Slots, keeps_index, keeps_state

# A layer called twice with the same arguments has to give the same result, up to this fraction of its largest value.
SAME = 1e-5

# Argument of layers that may attend to the positions that the layer before them chose, and returned after its output.
CHOSEN = "prev_topk_indices"

Pair = tuple  # keys and values, each `(batch, heads, seq, head_dim)`


class CannotReplayError(Exception):
    """A layer depends on more than its arguments and its keys and values."""


@contextmanager
def looped_by_hand(model, spec: LoopSpec) -> Iterator[None]:
    """Let a native model loop until the block ends.

    Run one sequence inside the block, with `use_cache=True`: either one forward or a prefill and its decode steps.

    Args:
        model: the native model.
        spec: the loop.

    Raises:
        CannotReplayError: from a forward inside the block; the loop of this family cannot be computed by hand.
    """
    handles = [] if spec.is_identity else list(_Replay(decoder_layers(model), spec).hook())
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Replay:
    """One sequence of tokens.

    Attributes:
        layers: the native model's decoder layers.
        spec: the loop.
        bodies: the layers that loop together and their loop, by the number of the layer after which they run again.
        runs: how often each layer runs.
        skipped: the layers that a path leaves out.
        calls: the latest natural pass of each layer of the span.
        iterations: how often each layer ran again in this forward.
        slots: with per_step, keys and values so far by layer and iteration.
        memories: the memory of each layer that keeps more than keys and values.
        rows: number of tokens so far.
        decode_steps: number of decode steps since the latest longer chunk.
        is_looping: whether the current forward loops.
        is_iterating: whether a layer runs by hand.
        chosen: the positions that the layer that ran last chose, for layers with the argument `CHOSEN`.
    """

    def __init__(self, layers: list, spec: LoopSpec):
        self.layers = layers
        self.spec = spec
        self.bodies = spans_of(spec) if spec.path is None else detours_of(spec)
        self.runs = runs_of(self.bodies)
        visited = [number for run in spec.path or () for number in range(*run)]
        self.skipped = [number for number in range(len(layers)) if visited and number not in visited]
        self.iterations: Counter[int] = Counter()
        self.calls: dict[int, _Call] = {}
        self.slots: dict[tuple[int, int], Pair] = {}
        self.memories: dict[int, Slots] = {}
        self.rows = 0
        self.decode_steps = 0
        self.is_looping = True
        self.is_iterating = False
        self.chosen: Any = None

    def hook(self) -> Iterator[Any]:
        """Set the hooks; yields their handles."""
        for number in self.skipped:
            yield self.layers[number].register_forward_hook(skip_layer, with_kwargs=True)
        for number in sorted({*self.runs, *self.bodies}):
            layer = self.layers[number]
            yield layer.register_forward_pre_hook(partial(self._before, number), with_kwargs=True)
            yield layer.register_forward_hook(partial(self._after, number))
            for path in _routers(layer) if self.spec.frozen_routing else ():
                yield layer.get_submodule(path).register_forward_hook(partial(self._route, number, path))

    def _before(self, number: int, layer, args, kwargs):
        if self.is_iterating:
            return None
        call = self.calls[number] = _Call(number, args, kwargs)
        self.iterations[number] = 0
        if number == min(self.runs):
            self._begin(call.hidden.shape[-2])
        self.chosen = call.kwargs.get(CHOSEN)
        if call.keeps_more:
            self.memories.setdefault(number, Slots(number)).begin(call.cache)
        return call.arguments(call.hidden, call.tape)

    def _begin(self, length: int) -> None:
        """Decide whether a forward of `length` tokens loops."""
        is_decode_step = length == 1 and self.rows > 0
        self.decode_steps = self.decode_steps + 1 if is_decode_step else 0
        self.rows += length
        most = {"full": math.inf, "bypass": 0, "first_n": self.spec.first_n}[self.spec.decode]
        self.is_looping = self.decode_steps <= most

    def _after(self, number: int, layer, args, output):
        if self.is_iterating:
            return None
        call = self.calls[number]
        call.output = _hidden_of(output)
        self._check_repeatable(number, call)
        self.chosen = output[1] if CHOSEN in call.kwargs else None
        if not self.is_looping:
            self._skip(number)
            return None
        if number not in self.bodies:
            return None
        return self._with_result(output, self._loop(*self.bodies[number], self.calls[number].output))

    def _with_result(self, output, hidden):
        """The output of a layer with other hidden states, and the positions that were chosen last."""
        if not isinstance(output, tuple):
            return hidden
        return (hidden, *output[1:]) if self.chosen is None else (hidden, self.chosen, *output[2:])

    def _skip(self, number: int) -> None:
        """Let all iterations remember what the natural pass of a layer remembers."""
        call, memory = self.calls[number], self.memories.get(number)
        for k in range(1, self.runs.get(number, 1)):
            if memory is None:
                self._store(number, k, call.tape.new)
            elif self.spec.kv == "per_step":
                self._run(number, call.hidden, memory.own(k))
        if memory is not None:
            memory.end(call.hidden)

    def _route(self, number: int, path: str, router, args, output):
        """Record the answer of a router in the natural pass; give it again in iterations."""
        routes = self.calls[number].routes
        if self.is_iterating:
            return routes[path]
        if path in routes:
            raise CannotReplayError(f"layer {number} asks its router {path} more than once")
        routes[path] = output
        return None

    def _loop(self, body: list[int], spec: LoopSpec, natural):
        """What a body gives in place of the output of the natural pass."""
        outputs = [*(self.calls[number].output for number in body[:-1]), natural]
        passes = count()

        def g(h, each=lambda position, output: output):
            if next(passes) == 0:
                return natural
            for position, number in enumerate(body):
                self.iterations[number] += 1
                h = each(position, self._iterate(number, self.iterations[number], h))
            return h

        hidden = by_hand(self.calls[body[0]].hidden, outputs, g, spec)
        for number in body:
            if number in self.memories:
                self.memories[number].end(self.calls[number].hidden)
        return hidden

    def _iterate(self, number: int, k: int, h):
        """A layer's output in iteration k."""
        call, memory = self.calls[number], self.memories.get(number)
        if memory is None or (self.spec.kv == "shared" and not call.keeps_state):
            return self._run(number, h, _Memory(call.tape, partial(self._attended, number, k)))
        if self.spec.kv == "shared":
            self._check_shared_state(number, call)
            return memory.shared(self.layers[number], partial(self._run, number), call.hidden, h)
        return self._run(number, h, memory.own(k) if self.spec.kv == "per_step" else memory.fresh())

    def _check_shared_state(self, number: int, call: _Call) -> None:
        """Raise CannotReplayError where a layer computes more than projections, a convolution and a state."""
        skips = [path for path, _ in self.layers[number].named_parameters() if _name(path) == "d"]
        if skips or call.tape.read or call.routes:
            why = "a skip term beside its state" if skips else "keys" if call.tape.read else "frozen routing"
            raise CannotReplayError(f"layer {number} has {why}, for which kv shared is not computed by hand")

    def _run(self, number: int, h, cache):
        """A layer's output for other hidden states and another cache; without one, for whole sequences."""
        args, kwargs = self.calls[number].arguments(h, cache)
        if cache is None and "attention_mask" in kwargs:
            kwargs["attention_mask"] = None  # it fits the chunk; there is no padding
        if CHOSEN in kwargs:
            kwargs[CHOSEN] = self.chosen
        self.is_iterating = True
        try:
            output = self.layers[number](*args, **kwargs)
        finally:
            self.is_iterating = False
        if CHOSEN in kwargs:
            self.chosen = output[1]
        return _hidden_of(output)

    def _attended(self, number: int, k: int, keys, values) -> Pair:
        tape = self.calls[number].tape
        if self.spec.kv == "shared":
            return tape.read
        if self.spec.kv == "per_step":
            return self._store(number, k, (keys, values))
        length = keys.shape[-2]
        past = tuple(each[..., : each.shape[-2] - length, :] for each in tape.read)
        return _joined(past, (keys, values), tape.read)

    def _store(self, number: int, k: int, own: Pair) -> Pair:
        """Append the keys and values of iteration k to those of earlier tokens."""
        pair = _joined(self.slots.get((number, k)), own, self.calls[number].tape.read)
        self.slots[number, k] = pair
        return pair

    def _check_repeatable(self, number: int, call: _Call) -> None:
        """Raise CannotReplayError unless a second natural pass by hand gives the first one's output."""
        if not call.tape.read and not call.keeps_state:
            raise CannotReplayError(f"layer {number} stores no keys and values of its own")
        for path in _routers(self.layers[number]) if self.spec.frozen_routing else ():
            if path not in call.routes:
                raise CannotReplayError(f"layer {number} chooses experts without calling {path}")
        memory = self.memories.get(number)
        natural = _Memory(call.tape, lambda keys, values: call.tape.read) if memory is None else memory.fresh()
        again = self._run(number, call.hidden, natural)
        difference = (again - call.output).abs().max().item()
        if call.has_changed_arguments() or not difference <= SAME * call.output.abs().max().item():
            raise CannotReplayError(f"layer {number} depends on more than its arguments and its keys and values")


class _Call:
    """The native model's call of a layer.

    Attributes:
        hidden: the hidden states that it gets, `(batch, seq, hidden)`.
        output: the hidden states that it returns.
        tape: records the keys and values.
        keeps_state: whether the layer keeps a recurrent state.
        keeps_more: whether it keeps a recurrent state or the keys of an index.
        routes: the answers of its routers, by their path in the layer; recorded with frozen routing.
    """

    output: Any = None

    def __init__(self, number: int, args, kwargs):
        self.args = args
        self.kwargs = kwargs
        self.hidden = args[0] if args else kwargs["hidden_states"]
        values = [*args, *kwargs.values()]
        self.cache = next((each for each in values if _is_cache(each)), None)
        if self.cache is None:
            raise CannotReplayError(f"layer {number} gets no K/V cache")
        self.tape = _Tape(getattr(self.cache, "self_attention_cache", self.cache))  # of decoders with cross-attention
        self.keeps_state = keeps_state(self.cache, number)
        self.keeps_more = self.keeps_state or keeps_index(self.cache, number)
        self.routes: dict[str, Any] = {}
        self.before = [(each, dict(each)) for each in values if isinstance(each, dict)]

    def arguments(self, hidden, cache) -> tuple[tuple, dict]:
        """The arguments with other hidden states and another cache."""
        args = [cache if each is self.cache else each for each in self.args]
        kwargs = {name: cache if each is self.cache else each for name, each in self.kwargs.items()}
        if args:
            args[0] = hidden
        else:
            kwargs["hidden_states"] = hidden
        return tuple(args), kwargs

    def has_changed_arguments(self) -> bool:
        """Whether a dict among the arguments has other contents than before the call."""
        return any(
            now.keys() != before.keys() or any(now[key] is not before[key] for key in now)
            for now, before in self.before
        )


class _Tape:
    """The K/V cache in the natural pass: records the pair that the layer stores, and what it reads."""

    def __init__(self, cache):
        self.cache = cache
        self.new: Pair = ()
        self.read: Pair = ()
        self.index: Any = None
        self.lengths: dict = {}

    def update_indexer(self, keys, *args):
        self.index = self.cache.update_indexer(keys, *args)
        return self.index

    def update(self, keys, values, *args, **kwargs) -> Pair:
        self.new = (keys, values)
        self.read = tuple(self.cache.update(keys, values, *args, **kwargs))
        return self.read

    def get_seq_length(self, *args):
        length = self.cache.get_seq_length(*args)
        self.lengths.setdefault(args, length)
        return length

    def __getattr__(self, name):
        return getattr(self.cache, name)


class _Memory:
    """The K/V cache in an iteration: stores nothing, and has the length that the natural pass saw."""

    def __init__(self, tape: _Tape, attended):
        self.tape = tape
        self.update = lambda keys, values, *args, **kwargs: attended(keys, values)
        self.update_indexer = lambda keys, *args: tape.index

    def get_seq_length(self, *args):
        return self.tape.lengths[args] if args in self.tape.lengths else self.tape.cache.get_seq_length(*args)

    def __getattr__(self, name):
        if "state" in name:
            raise CannotReplayError(f"a layer keeps more than keys and values in its cache ({name})")
        answer = getattr(self.tape, name)
        if name == "layers" and any(hasattr(slot, "store_compression_weights") for slot in answer):
            raise CannotReplayError("a layer pools tokens in its cache")
        return answer


def _is_cache(value) -> bool:
    return callable(getattr(value, "update", None)) and callable(getattr(value, "get_seq_length", None))


def _joined(past: Pair | None, own: Pair, like: Pair) -> Pair:
    """The past and then the own rows, of which a sliding window keeps as many of the last as `like` has."""
    pairs = [(each,) for each in own] if past is None else list(zip(past, own, strict=True))
    rows = [torch.cat(pair, dim=-2) for pair in pairs]
    return tuple(each[..., -wanted.shape[-2] :, :] for each, wanted in zip(rows, like, strict=True))


def _routers(layer) -> list[str]:
    """Paths of the modules in a layer that choose experts.

    Raises:
        CannotReplayError: the layer has routed experts, but no module with the name of a router.
    """
    paths = [path for path, _ in layer.named_modules() if path]
    routed = [path for path in paths if "expert" in _name(path) and "share" not in path]
    beside = {path.rpartition(".")[0] for path in routed}
    routers = [
        path
        for path in paths
        if _name(path) in ("router", "router_gate") or (_name(path) == "gate" and path.rpartition(".")[0] in beside)
    ]
    if routed and not routers:
        raise CannotReplayError(f"{routed[0]} has experts, but no module named router or gate")
    return routers


def _name(path: str) -> str:
    return path.rpartition(".")[2].lower()


def _hidden_of(output):
    return output[0] if isinstance(output, tuple) else output
