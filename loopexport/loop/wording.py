"""A loop in words and formulas, for the model card and the output of the commands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from loopexport.templates.looped_path import joined_runs

from .spec import RULES, LoopSpec


def describe_span(spec: LoopSpec) -> str:
    """The spans in the users' spelling: `12:20`, or `4:8x2 and 12:20x3`; of a path, `0:15,12:40`."""
    if spec.path is not None:
        return describe_path(spec.path)
    steps = [f"x{each}" if isinstance(spec.steps, tuple) else "" for each in spec.steps_of_spans]
    return " and ".join(f"{start}:{stop}{times}" for (start, stop), times in zip(spec.spans, steps, strict=True))


def describe_loop(spec: LoopSpec) -> str:
    """Which layers loop, and K: `span 12:20, K 3`, or `path 0:15,12:40`."""
    if spec.path is not None:
        return f"path {describe_span(spec)}{', K 1' if spec.is_identity else ''}"
    return f"span {describe_span(spec)}, K {describe_steps(spec)}"


def describe_path(path: Iterable[tuple[int, int]]) -> str:
    """A path in the spelling for `--path` without the last layer of each run: `0:15,12:40`."""
    return ",".join(f"{start}:{stop}" for start, stop in path)


def describe_layers(spec: LoopSpec) -> str:
    """The looped layers by number: `layers 12 to 19`."""
    return f"layers {describe_runs(spec.spans)}" if len(spec.spans) > 1 else describe_numbers(spec.layers)


def describe_numbers(layers: Sequence[int]) -> str:
    """Layers by number: `layer 12`, `layers 12 to 19 and 21`, or `no layers`."""
    if not layers:
        return "no layers"
    return f"{'layer' if len(layers) == 1 else 'layers'} {describe_runs(joined_runs(layers))}"


def describe_runs(runs: Iterable[tuple[int, int]]) -> str:
    """Half-open ranges of layers in words: `4 to 7 and 12`."""
    return " and ".join(f"{start}" if stop == start + 1 else f"{start} to {stop - 1}" for start, stop in runs)


def describe_skipped(spec: LoopSpec, num_layers: int) -> str:
    """The layers that a path leaves out: `, without layers 7 to 8`, or nothing."""
    skipped = spec.skipped(num_layers)
    return f", without {describe_numbers(skipped)}" if skipped else ""


def describe_applied(spec: LoopSpec, num_layers: int, verb: str = "") -> str:
    """What loops, as part of a sentence: `layers 12 to 19 of its 40 layers applied 3 times`.

    Args:
        num_layers: the model's number of layers.
        verb: between the layers and what happens to them, such as ` are`.
    """
    of_all = f" of its {num_layers} layers{verb}"
    if spec.path is None:
        in_order = ", respectively" if isinstance(spec.steps, tuple) else ""
        return f"{describe_layers(spec)}{of_all} applied {describe_steps(spec)} times{in_order}"
    if spec.is_identity:
        until = "until `loop_steps` is 2"
        switch = f" is switched off {until}" if verb else f" switched off ({until}, it is the base model)"
        return f"a path through its {num_layers} layers{switch}"
    skipped = spec.skipped(num_layers)
    left_out = f"{describe_numbers(skipped)}{{}} left out"
    if not spec.layers:
        return left_out.format(of_all)
    again = f"{describe_layers(spec)}{of_all} applied more than once"
    return f"{again}, and {left_out.format('')}" if skipped else again


def repeats_as_base(spec: LoopSpec) -> bool:
    """Whether every visit of a path is the layer of the base: repeats attend to keys and values of their own."""
    return spec.kv == "per_step" or not spec.layers


def describe_visits(spec: LoopSpec) -> str:
    """How a path runs its layers, for the output of the commands."""
    if spec.is_identity:
        return "switched off by steps 1: the base model"
    if repeats_as_base(spec):
        return "each visit runs the layer as it is"
    own = " for the past, and to their own in the current chunk" if spec.kv == "reference" else ""
    return f"repeats attend to the keys and values of the first visit{own}"


def describe_steps(spec: LoopSpec) -> str:
    """K: `3`, or `2 and 3` if spans differ in it."""
    return " and ".join(map(str, spec.steps_of_spans if isinstance(spec.steps, tuple) else (spec.steps,)))


def describe_rule(spec: LoopSpec) -> str:
    """The update rule with the values of its parameters: `euler, s = 0.25`."""
    takes = RULES[spec.rule].takes
    values = {"s": _numbers(spec.step_size)} if "damping" in takes else {}
    if spec.schedule is not None:
        values["schedule"] = " ".join(f"{each:g}" for each in spec.schedule)
    if "momentum" in takes:
        values["momentum"] = f"{0.3 if spec.momentum is None else spec.momentum:g}"
    if "history" in takes:
        values["history"] = f"{spec.history or 2}"
    return ", ".join([spec.rule, *(f"{name} = {value}" for name, value in values.items())])


def describe_refinements(spec: LoopSpec) -> str:
    """The refinements that are switched on, or `none`."""
    names = {"frozen routing": spec.frozen_routing, "norm interpolation": spec.norm_interpolation}
    return ", ".join(name for name, is_on in names.items() if is_on) or "none"


def describe_decode(spec: LoopSpec) -> str:
    """The decode mode, with the number of steps for first_n."""
    return f"first_n {spec.first_n}" if spec.decode == "first_n" else spec.decode


def describe_unlooped_steps(spec: LoopSpec) -> str:
    """Which decode steps run at the base's cost: `; decode steps run at the base's cost`, or nothing."""
    if spec.is_identity or spec.decode == "full":
        return ""
    after = f" after the first {spec.first_n}" if spec.decode == "first_n" else ""
    return f"; decode steps{after} run at the base's cost"


def _numbers(value: float | tuple[float, ...]) -> str:
    return " and ".join(f"{each:.6g}" for each in (value if isinstance(value, tuple) else (value,)))


def formula(spec: LoopSpec) -> str:
    """The formula of the loop, one line each, with the numbers of the spec filled in; of a path, its layers.

    If spans differ in K, each has lines of its own.
    """
    if spec.path is not None:
        return f"layers {describe_runs(spec.path).replace(' and ', ', then ')}"
    if not isinstance(spec.steps, tuple):
        return "\n".join(_formula_lines(spec))
    loops = [(span, replace(spec, span=span, steps=steps)) for span, steps in zip(spec.spans, spec.steps, strict=True)]
    return "\n".join(line for (start, stop), loop in loops for line in (f"span {start}:{stop}", *_formula_lines(loop)))


def _formula_lines(spec: LoopSpec) -> list[str]:
    beta, last = f"{spec.anchor:g}", spec.steps
    out = f"h_{last}" if spec.anchor == 0 else f"{beta} n + {1 - spec.anchor:g} h_{last}"
    return [*_recursion(spec), f"out     = {out}"]


def _recursion(spec: LoopSpec) -> list[str]:
    natural = "n       = g(x)"
    if spec.rule in ("residual_scaled", "poly_blend"):
        return [natural, f"h_{spec.steps}     = {RULES[spec.rule].summary}"]
    if spec.rule != "euler":
        return [natural, f"h_0     = x;  each of {spec.steps} steps: {RULES[spec.rule].summary}"]
    s, steps = _numbers(spec.step_size), spec.steps_of_spans[0]
    lines = [natural, f"h_1     = x + {s} (n - x)"]
    if steps > 1:
        lines.append(f"h_(k+1) = h_k + {s} (g(h_k) - h_k)    k = 1 .. {steps - 1}")
    if spec.norm_interpolation:
        lines.append(f"|h_k|   is rescaled to |x| + (|n| - |x|) k/{spec.steps} for each token, k < {spec.steps}")
    return lines
