"""Random paths through the layers of a model, and what a loop visits, counted without the templates."""

from __future__ import annotations

import random


def random_path(seed: int, num_layers: int, *, leaves_out: bool = False) -> list[int]:
    """The layers of a path: each the first time in order, with random detours backwards, layer by layer.

    Some repeat a span several times, as spans do; some overlap. `leaves_out` drops one or two layers after the first.
    """
    numbers = random.Random(seed)
    dropped = numbers.sample(range(1, num_layers), numbers.choice([1, 2])) if leaves_out else []
    visited: list[int] = []
    order: list[int] = []
    for layer in range(num_layers):
        if layer in dropped:
            continue
        visited.append(layer)
        order.append(layer)
        if numbers.random() < 0.35:
            start = numbers.randrange(len(visited))
            stop = numbers.choice([len(visited), len(visited), numbers.randrange(start, len(visited)) + 1])
            order += visited[start:stop] * numbers.choice([1, 1, 2])
    return order


def runs_in(order: list[int]) -> list[tuple[int, int]]:
    """The half-open runs of a list of layers, cut wherever the next layer is not the next number."""
    runs: list[tuple[int, int]] = []
    for layer in order:
        if runs and runs[-1][1] == layer:
            runs[-1] = (runs[-1][0], layer + 1)
        else:
            runs.append((layer, layer + 1))
    return runs


def order_of_spans(spans, steps, num_layers: int, mode: str = "block") -> list[int]:
    """The layers that naive looping visits: a span, or in layer mode each of its layers, K times before the next."""
    order: list[int] = []
    ends = {}
    for (start, stop), count in zip(spans, steps, strict=True):
        bodies = [(start, stop)] if mode == "block" else [(layer, layer + 1) for layer in range(start, stop)]
        ends |= {body[1] - 1: (body, count) for body in bodies}
    for layer in range(num_layers):
        order.append(layer)
        if layer in ends:
            (start, stop), count = ends[layer]
            order += list(range(start, stop)) * (count - 1)
    return order
