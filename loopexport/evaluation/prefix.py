"""Shared prefixes: the layers before a span compute the same in every loop, so they run once for each batch.

lm-evaluation-harness runs the same batches in the same order for every arm that answers the same requests. So the n-th
forward of one arm gets the n-th batch of the others. The base runs first and leaves, for each batch, the state that
enters the earliest span. Arms follow in the order of their spans: each starts from that state, and leaves the state
that enters its own span. One state for each batch is kept, whatever the number of arms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loopexport.errors import one_line
from loopexport.loop.spec import LoopSpec

if TYPE_CHECKING:
    import torch

    from .arms import Arm, Model

MEMORY_SHARE = 0.01  # of the weights, for all states
CHECK_ROWS, CHECK_TOKENS = 2, 128
LOOP = "_loop"  # the attribute of a looped decoder, as in templates/looped_decoder


@dataclass(frozen=True)
class State:
    """What one forward left in front of a layer.

    Attributes:
        tokens: of the batch, `(batch, seq)`.
        layer: the number of the layer in front of which the state is.
        output: what the layer before it returned.
    """

    tokens: torch.Tensor
    layer: int
    output: Any


@dataclass
class SharedPrefix:
    """The states that the arms of one slab leave for each other.

    Attributes:
        off: why nothing is shared; empty if it is, or if that was not checked yet.
        evaluations, saved: layer evaluations of all forwards without sharing, and how many of them were saved.
    """

    off: str = ""
    evaluations: int = 0
    saved: int = 0
    _states: dict[int, State] = field(default_factory=dict, repr=False)
    _room: int = 1
    _is_checked: bool = False

    def clear(self) -> None:
        """Forget the states, before other requests or other batches."""
        self._states.clear()

    def batches(self, lm: Any, longest: str, batch_size: int) -> int:
        """How many batches a slab may have, so that its states fit into a small part of the weights' memory.

        Args:
            lm: the model of lm-evaluation-harness.
            longest: the text of the longest request.
            batch_size: rows of a forward.
        """
        weights = list(lm.model.parameters())
        budget = MEMORY_SHARE * sum(each.numel() * each.element_size() for each in weights)
        tokens = min(len(lm.tok_encode(longest)), lm.max_length)
        state = batch_size * tokens * lm.model.config.get_text_config().hidden_size * weights[0].element_size()
        self._room = max(1, int(budget / max(state, 1)))
        return self._room

    def check(self, model: Model, arms: Sequence[Arm], texts: Sequence[str]) -> None:
        """Compare a batch with and without sharing, once; if one bit differs, share nothing.

        Args:
            model: of all arms.
            arms: in their order; a few of each kind are tried.
            texts: of the first requests.
        """
        if self._is_checked:
            return
        self._is_checked = True
        try:
            tokens = _batch(model.lm, texts)
            differing = [arm.name for arm in _different(arms) if not self._is_exact(model, arm, tokens)]
        except Exception as error:  # whatever a family raises where a layer misses what an earlier one hands on
            self.off = f"{type(error).__name__}: {one_line(error, 200)}"
        else:
            self.off = f"it changes the logits of {differing[0]}" if differing else ""
        self.clear()
        self.evaluations = self.saved = 0

    def find(self, number: int) -> State | None:
        """The state of a forward of this slab; None if there is none."""
        return self._states.get(number)

    def keep(self, number: int, state: State) -> None:
        """Keep the state of a forward of this slab if there is room."""
        if number in self._states or len(self._states) < self._room:
            self._states[number] = state

    def _is_exact(self, model: Model, arm: Arm, tokens: torch.Tensor) -> bool:
        """Whether one arm gives the same bits without sharing, with the state of the arm before, and with its own."""
        import torch

        network = model.use(arm).model
        with torch.no_grad():
            whole = network(tokens).logits
            for _ in range(2):
                with self.sharing(network, arm.spec):
                    if not _same_bits(network(tokens).logits, whole):
                        return False
        return True

    @contextmanager
    def sharing(self, network: Any, spec: LoopSpec) -> Iterator[None]:
        """Until the end of the block, forwards start from the states that there are, and leave their own.

        Args:
            network: the looped model.
            spec: the loop of the arm that runs.
        """
        if self.off:
            yield
            return
        layers = _layers(network)
        start = min((*spec.layers, *spec.skipped(len(layers))), default=len(layers))
        forwards = _Forwards(self, start, sum(spec.layer_runs(len(layers))))
        handles = [network.register_forward_pre_hook(forwards.begin, with_kwargs=True)]
        if start:
            handles.append(layers[start - 1].register_forward_hook(forwards.keep))
        try:
            with _skippable(layers[:start], forwards):
                yield
        finally:
            for handle in handles:
                handle.remove()


class _Forwards:
    """The forwards of one arm over one slab."""

    def __init__(self, prefix: SharedPrefix, start: int, evaluations: int):
        self._prefix, self._start, self._evaluations = prefix, start, evaluations
        self._number = -1
        self._tokens: torch.Tensor | None = None
        self._state: State | None = None

    def begin(self, network, args, kwargs) -> None:
        """Before each forward: find its state."""
        import torch

        self._number += 1
        self._tokens = args[0] if len(args) == 1 and not kwargs else None  # a mask, for one, could change the state
        known = self._prefix.find(self._number)
        is_same = known is not None and self._tokens is not None and torch.equal(known.tokens, self._tokens)
        self._state = known if is_same else None
        self._prefix.evaluations += self._evaluations
        self._prefix.saved += self.known_layers

    @property
    def known_layers(self) -> int:
        """How many of the first layers need not run."""
        return 0 if self._state is None else min(self._state.layer, self._start)

    def output(self) -> Any:
        """What the last of these layers returned."""
        assert self._state is not None
        return self._state.output

    def keep(self, layer, args, output) -> None:
        """After the layer in front of the span: leave the state for the next arm."""
        if self._tokens is not None and self.known_layers < self._start:
            self._prefix.keep(self._number, State(self._tokens, self._start, output))


@contextmanager
def _skippable(layers: Sequence[Any], forwards: _Forwards) -> Iterator[None]:
    """Let layers return the known state instead of computing it. An own `forward`, as of accelerate, comes back."""
    own = [vars(layer).get("forward") for layer in layers]
    for number, layer in enumerate(layers):
        layer.forward = _skipping(layer.forward, number, forwards)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _skipping(forward: Callable, number: int, forwards: _Forwards) -> Callable:
    @functools.wraps(forward)
    def run(*args, **kwargs):
        return forwards.output() if number < forwards.known_layers else forward(*args, **kwargs)

    return run


def _layers(network: Any) -> list:
    """The native decoder layers of a looped model."""
    decoder = next(module for module in network.modules() if LOOP in vars(module))
    return list(vars(decoder)[LOOP].layers_of(decoder))


def _different(arms: Sequence[Arm]) -> list[Arm]:
    """The first two arms, the last, and one for each K/V policy and mode, in their order."""
    kinds = {(arm.spec.kv, arm.spec.mode): arm.name for arm in arms}
    chosen = {arm.name for arm in (*arms[:2], arms[-1])} | set(kinds.values())
    return [arm for arm in arms if arm.name in chosen]


def _batch(lm: Any, texts: Sequence[str]) -> torch.Tensor:
    """A small batch of token ids, `(batch, seq)`. The first token fills up short rows."""
    import torch

    rows = [lm.tok_encode(text)[-min(CHECK_TOKENS, lm.max_length) :] for text in texts[:CHECK_ROWS]]
    length = max(map(len, rows))
    return torch.tensor([row + row[:1] * (length - len(row)) for row in rows], device=lm.device)


def _same_bits(logits: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether two tensors are equal; unlike for `torch.equal`, NaN equals NaN."""
    return bool(((logits == others) | (logits.isnan() & others.isnan())).all())
