"""A loop drawn as the sequence of layer evaluations, in lines of text."""

from __future__ import annotations

import textwrap
from math import ceil

from loopexport.base.checkpoint import Checkpoint
from loopexport.loop.cost import layer_evaluations
from loopexport.loop.route import AGAIN, EACH, LEFT_OUT, NATURAL, Stretch, as_path, cache_slots, route
from loopexport.loop.spec import RULES, LoopSpec
from loopexport.loop.wording import describe_path, describe_unlooped_steps

from .text import loop_lines, where_line

LAYER = "layer"  # above the numbers of layers
MAX_BAR = 40  # columns of a drawing; with more layers, a column stands for several
MAX_LINE = 90  # of a path
ALSO_READS = {
    "shared": "layers that run again read those of their natural pass",
    "per_step": "each evaluation has its own",
    "reference": "layers that run again read the natural ones of the past",
}


def path_lines(base: Checkpoint, spec: LoopSpec, is_path_given: bool = False) -> list[str]:
    """The loop, its drawing, and what it costs; and the loop as a path, unless the user gave it as one."""
    count = base.num_layers
    return [
        f"Model    {base.origin.name}: {base.model_type}, {count} layers",
        where_line(base, spec),
        *loop_lines(spec),
        "",
        *drawing(spec, count),
        "",
        f"Total    {layer_evaluations(count, spec)} layer evaluations a token instead of {count}: "
        f"{layer_evaluations(count, spec) / count:.2f}x{describe_unlooped_steps(spec)}",
        f"K/V      {cache_slots(spec, count)} slots of the cache instead of {count}; {ALSO_READS[spec.kv]}",
        *([] if is_path_given else _same_lines(spec, count)),
    ]


def path_values(base: Checkpoint, spec: LoopSpec) -> dict:
    """The same for `--json`, with half-open layers."""
    count, path = base.num_layers, as_path(spec, base.num_layers)
    return {
        "model": {"name": base.origin.name, "model_type": base.model_type, "num_layers": count},
        "spec": {**spec.to_config_fields(), "loop_damping": spec.step_size},
        "route": [stretch.to_dict() for stretch in route(spec, count)],
        "runs": spec.layer_runs(count),
        "left_out": list(spec.skipped(count)),
        "layer_evaluations": layer_evaluations(count, spec),
        "cache_slots": cache_slots(spec, count),
        "same_as_path": None if path is None else [list(run) for run in path],
    }


def drawing(spec: LoopSpec, num_layers: int) -> list[str]:
    """A line for each stretch: its layers, how often it runs, where it is in the model, and how it runs."""
    stretches = route(spec, num_layers)
    labels = [_label(stretch) for stretch in stretches]
    times = [f"x{stretch.times}" if stretch.times > 1 else "" for stretch in stretches]
    widths = max(map(len, [LAYER, *labels])), max(map(len, times))
    columns = min(num_layers, MAX_BAR)
    rows = [
        f"{label:>{widths[0]}} {often:{widths[1]}}  {_bar(stretch, num_layers):{columns}}  {_note(stretch, spec)}"
        for stretch, label, often in zip(stretches, labels, times, strict=True)
    ]
    last = str(num_layers - 1)
    ruler = LAYER.rjust(widths[0]) + " " * (widths[1] + 3) + "0" + (last.rjust(columns - 1) if columns > 1 else "")
    return [ruler, *(row.rstrip() for row in rows)]


def _label(stretch: Stretch) -> str:
    """The layers with the last one."""
    last = stretch.stop - 1
    return f"{last}" if stretch.start == last else f"{stretch.start}-{last}"


def _bar(stretch: Stretch, num_layers: int) -> str:
    scale = min(num_layers, MAX_BAR) / num_layers
    start, stop = int(stretch.start * scale), ceil(stretch.stop * scale)
    mark = {NATURAL: "=", LEFT_OUT: "."}.get(stretch.kind, "~" if stretch.blended else "#")
    return " " * start + mark * (stop - start)


def _note(stretch: Stretch, spec: LoopSpec) -> str:
    words = {NATURAL: "", LEFT_OUT: "left out", AGAIN: "again", EACH: "each in turn"}[stretch.kind]
    words = "in a row" if stretch.kind == EACH and stretch.stop == stretch.start + 1 else words
    return f"{words}, blended{_blend(stretch, spec)}" if stretch.blended else words


def _blend(stretch: Stretch, spec: LoopSpec) -> str:
    name = "" if spec.rule == "euler" else f" by {spec.rule}"
    return f"{name}, s = {stretch.step_size:.4g}" if "damping" in RULES[spec.rule].takes else name


def _same_lines(spec: LoopSpec, num_layers: int) -> list[str]:
    """The options that give the same loop as a path, if a path can."""
    path = as_path(spec, num_layers)
    if path is None:
        return []
    others = {"kv": spec.kv if spec.kv != "per_step" else "", "decode": spec.decode if spec.decode != "full" else ""}
    options = [f"--{name} {value}" for name, value in others.items() if value]
    options += [f"--first-n {spec.first_n}"] if spec.decode == "first_n" else []
    runs = describe_path(path).replace(",", ", ")  # a line may end after a comma
    lines = textwrap.wrap(" ".join(["--path", runs, *options]), MAX_LINE, break_on_hyphens=False)
    return [f"{'' if index else 'Same as':8} {line.replace(', ', ',')}" for index, line in enumerate(lines)]
