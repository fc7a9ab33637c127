"""A loop as the sequence of layer evaluations that a token takes: stretches of layers, in order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby

from loopexport.templates.looped_fields import MAX_PATH
from loopexport.templates.looped_path import BodySpec, joined_runs
from loopexport.templates.looped_spec import LoopSpec, bodies_within

# How layers run in a stretch.
NATURAL, AGAIN, EACH, LEFT_OUT = "natural", "again", "each", "left out"


@dataclass(frozen=True)
class Stretch:
    """Neighbouring layers that run in one way.

    Attributes:
        start, stop: the layers, half-open.
        kind: "natural" for the base model's own pass, "again" for layers that run again after it, "each" if every
            layer runs again before the next one begins (the first time is natural), "left out" if none runs.
        times: how many times the whole stretch runs; for "each" a single layer, the natural pass included.
        blended: whether a blend follows each iteration; else the layers get their own output.
        step_size: s of the iterations; None in a natural pass.
    """

    start: int
    stop: int
    kind: str
    times: int = 1
    blended: bool = False
    step_size: float | None = None

    @property
    def evaluations(self) -> int:
        """How many layer evaluations it is."""
        return self.times * (self.stop - self.start)

    def to_dict(self) -> dict:
        """The stretch as one JSON object, with its layers half-open."""
        values = {"layers": [self.start, self.stop], "kind": self.kind, "times": self.times}
        if self.step_size is None:
            return values
        return {**values, "blended": self.blended, "step_size": self.step_size}


def route(spec: LoopSpec, num_layers: int) -> list[Stretch]:
    """The stretches that a token which loops takes through a model of `num_layers` layers."""
    bodies = {body.after: body for body in bodies_within(spec, num_layers)}
    skipped = set(spec.skipped(num_layers))
    stretches: list[Stretch] = []
    for alone, group in groupby(range(num_layers), lambda layer: _alone(bodies.get(layer))):
        layers = list(group)
        if alone is not None:
            stretches.append(Stretch(layers[0], layers[-1] + 1, EACH, *alone))
            continue
        for layer in layers:
            _add(stretches, layer, LEFT_OUT if layer in skipped else NATURAL)
            stretches += _again(bodies[layer]) if layer in bodies else ()
    return [replace(each, blended=_is_blended(spec, each.step_size)) for each in stretches]


def as_path(spec: LoopSpec, num_layers: int) -> tuple[tuple[int, int], ...] | None:
    """The path that visits the same layers without blends, as half-open runs; None if no path computes the same."""
    if spec.path is not None and not spec.is_identity:
        return spec.path
    stretches = route(spec, num_layers)
    is_path = not (spec.is_identity or spec.frozen_routing or any(each.blended for each in stretches))
    if not is_path or sum(spec.layer_runs(num_layers)) > MAX_PATH:
        return None
    return joined_runs(layer for stretch in stretches for layer in _visits(stretch))


def cache_slots(spec: LoopSpec, num_layers: int) -> int:
    """How many slots of the cache a model fills, of which the base has one for each layer."""
    if spec.kv == "per_step" and not spec.is_identity:
        return sum(spec.layer_runs(num_layers))
    return num_layers - len(spec.skipped(num_layers))


def _alone(body: BodySpec | None) -> tuple[int, bool, float] | None:
    """Times, blends and step size of a body that is its own last layer alone; None for another."""
    if body is None or body.layers != (body.after,):
        return None
    return body.evaluations, False, body.step_size


def _is_blended(spec: LoopSpec, step_size: float | None) -> bool:
    is_naive = spec.rule == "euler" and step_size == 1 and spec.anchor == 0 and not spec.norm_interpolation
    return step_size is not None and not is_naive


def _add(stretches: list[Stretch], layer: int, kind: str) -> None:
    """Append a layer to the last stretch if it goes on there, else as a stretch of its own."""
    last = stretches[-1] if stretches else None
    if last is not None and (last.kind, last.stop) == (kind, layer):
        stretches[-1] = Stretch(last.start, layer + 1, kind, last.times)
    else:
        stretches.append(Stretch(layer, layer + 1, kind, 0 if kind == LEFT_OUT else 1))


def _again(body: BodySpec) -> Iterator[Stretch]:
    """What runs again in a body; the same runs one after another are one stretch."""
    for (start, stop), group in groupby(joined_runs(body.layers)):
        yield Stretch(start, stop, AGAIN, len(list(group)) * (body.evaluations - 1), False, body.step_size)


def _visits(stretch: Stretch) -> Iterator[int]:
    """The layers that a stretch without blends evaluates, in order."""
    layers = range(stretch.start, stretch.stop)
    if stretch.kind == EACH:
        yield from (layer for layer in layers for _ in range(stretch.times))
    else:
        yield from list(layers) * stretch.times
