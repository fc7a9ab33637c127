"""Which layers a loop runs again, after which layer, and how often: from its spans, or from a path through the layers.

Every export has a copy of this file. It needs only the standard library.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple


class BodySpec(NamedTuple):
    """Layers that loop as one function g: those of a span, in layer mode a single one, or a detour of a path.

    Attributes:
        layers: their numbers, in the order in which one run of g visits them.
        after: they run again after the first run of this layer.
        steps: K, how many times g is evaluated, the natural pass included.
        step_size: s.
        evaluations: how many times each layer runs in this body, the natural pass included; some rules run a step
            several times.
    """

    layers: tuple[int, ...]
    after: int
    steps: int
    step_size: float
    evaluations: int

    @property
    def hull(self) -> range:
        """All layers from the first one that runs again to the one after which it does."""
        return range(min(self.layers), self.after + 1)

    def crosses(self, layer: int) -> bool:
        """Whether the body has layers on both sides of the start of a layer."""
        return self.hull.start < layer < self.hull.stop


def runs_of(bodies) -> dict[int, int]:
    """How many times each layer of these bodies runs, including the natural pass; by layer number, in order."""
    runs = dict.fromkeys(sorted({layer for body in bodies for layer in body.layers}), 1)
    for body in bodies:
        for layer in body.layers:
            runs[layer] += body.evaluations - 1
    return runs


def extra_slots_of(bodies) -> tuple[tuple[int, int], ...]:
    """The layer and the iteration of each cache slot that these bodies need beyond one per layer: by iteration."""
    runs = runs_of(bodies)
    most = max([1, *runs.values()])  # a compiler does not know `default`
    return tuple((layer, k) for k in range(1, most) for layer, count in runs.items() if k < count)


def layers_of(path: tuple) -> list[int]:
    """The numbers of the layers that a path visits, in order."""
    return [layer for start, stop in path for layer in range(start, stop)]


def detours_of(path: tuple) -> list[tuple[int, tuple[int, ...]]]:
    """The parts of a path that visit layers again: the layer that each comes after, and the layers that it visits."""
    detours: dict[int, list[int]] = {}
    newest = -1
    for layer in layers_of(path):
        if layer > newest:
            newest = layer
        else:
            detours.setdefault(newest, []).append(layer)
    return [(after, tuple(layers)) for after, layers in detours.items()]


def skipped_by(path: tuple, num_layers: int) -> tuple[int, ...]:
    """The layers of a model that a path never visits."""
    visited = set(layers_of(path))
    return tuple(layer for layer in range(num_layers) if layer not in visited)


def check_path(path: tuple) -> None:
    """Raise ValueError unless a path starts at layer 0 and visits layers for the first time in their own order."""
    layers = layers_of(path)
    if layers[0] != 0:
        raise ValueError(f"the path starts at layer {layers[0]}; it must start at layer 0, which counts the tokens")
    visited, newest = set(), 0
    for layer in layers:
        if layer not in visited and layer < newest:
            raise ValueError(
                f"the path first visits layer {layer} after layer {newest}; layers can be visited again and left out, "
                "but not reordered"
            )
        visited.add(layer)
        newest = max(newest, layer)


def joined_runs(layers) -> tuple[tuple[int, int], ...]:
    """The shortest list of half-open runs that visits these layers in this order."""
    layers = list(layers)
    if not layers:
        return ()
    cuts = [0, *(at + 1 for at, (one, two) in enumerate(pairwise(layers)) if two != one + 1), len(layers)]
    return tuple((layers[start], layers[stop - 1] + 1) for start, stop in pairwise(cuts))
