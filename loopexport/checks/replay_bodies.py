"""Which layers the loop by hand runs again, after which layer, and with which K; it uses no code of the templates."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from loopexport.loop.spec import RULES, LoopSpec


def spans_of(spec: LoopSpec) -> dict[int, tuple[list[int], LoopSpec]]:
    """The spans, in layer mode their layers one by one, each with the loop of its own number of steps."""
    bodies = {}
    for index, (start, stop) in enumerate(spec.spans):
        steps = spec.steps[index] if isinstance(spec.steps, tuple) else spec.steps
        loop = replace(spec, span=(start, stop), steps=steps)
        alone = [[number] for number in range(start, stop)]
        for body in alone if spec.mode == "layer" else [list(range(start, stop))]:
            bodies[body[-1]] = (body, loop)
    return {last: body for last, body in bodies.items() if not body[1].is_identity}


def detours_of(spec: LoopSpec) -> dict[int, tuple[list[int], LoopSpec]]:
    """The layers that a path visits again, by the newest layer before them, with the loop that runs them once more."""
    once_more = replace(spec, path=None, span=(0, 1), damping=1.0)
    bodies: dict[int, tuple[list[int], LoopSpec]] = {}
    path = [number for run in spec.path or () for number in range(*run)]
    for at, number in enumerate(path):
        if number in path[:at]:
            bodies.setdefault(max(path[:at]), ([], once_more))[0].append(number)
    return bodies


def runs_of(bodies: dict[int, tuple[list[int], LoopSpec]]) -> dict[int, int]:
    """How often each layer of the bodies runs."""
    runs: Counter[int] = Counter()
    for layers, spec in bodies.values():
        for number in layers:
            runs[number] += steps_of(spec) * RULES[spec.rule].evaluations_per_step - 1
    return {number: runs[number] + 1 for number in sorted(runs)}


def skip_layer(layer, args, kwargs, output):
    """Replace what a layer returns by what it got."""
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def steps_of(spec: LoopSpec) -> int:
    """K of the loop of one body."""
    assert isinstance(spec.steps, int), "the loop of one body has one K"
    return spec.steps
