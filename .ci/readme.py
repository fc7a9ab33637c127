"""The generated parts of the README, each a function that returns Markdown; `make docs` puts them in place."""

from __future__ import annotations

from click.testing import CliRunner

from loopexport.cli import main
from loopexport.describe import describe_span
from loopexport.families import ONNX, grouped_outcomes, outcomes, releases
from loopexport.presets import PRESETS, Preset, Result
from loopexport.report import rule_lines

STATUSES = ("works", "in part", "no span", "refused", "untried")


def presets() -> str:
    """The published cells."""
    rows = [(f"`{preset.name}`", preset.models[0], _cell(preset), preset.status, _gains(preset)) for preset in PRESETS]
    return _table(("preset", "measured on", "span of depth, K", "status", "points against the base"), rows)


def rules() -> str:
    """The update rules."""
    return _text("\n".join(rule_lines()))


def family_counts() -> str:
    """How many families came out how, on each release."""
    lines = []
    for release in releases():
        statuses = [record[release].partition(": ")[0] for record in outcomes().values() if release in record]
        counts = ", ".join(f"{statuses.count(status)} {status}" for status in STATUSES)
        lines.append(f"- transformers {release}, {len(statuses)} families: {counts}")
    exported = [record[ONNX].partition(": ")[0] for record in outcomes().values() if ONNX in record]
    counts = ", ".join(f"{exported.count(status)} {status}" for status in ("works", "refused"))
    lines.append(f"- ONNX, {len(exported)} families that can be looped, wholly or in part: {counts}")
    return "\n".join(lines)


def families() -> str:
    """All families, those of like outcome in one row."""
    rows = [
        (*(status or "absent" for status in statuses), onnx or "none", ", ".join(names), reason)
        for (*statuses, onnx), reason, names in grouped_outcomes()
    ]
    return _table((*releases(), "ONNX", "families", "why not"), rows)


def commands(*names: str) -> str:
    """`--help` of commands."""
    parts = []
    for name in names:
        arguments = [*name.split(), "--help"]
        text = CliRunner().invoke(main, arguments, prog_name="loopexport", terminal_width=100).output
        parts.append(f"### loopexport {name}\n\n{_text(text.rstrip())}")
    return "\n\n".join(parts)


def _cell(preset: Preset) -> str:
    if preset.spec is None:
        return "not published"
    return f"{describe_span(preset.spec)} of {preset.num_layers}, {preset.spec.steps}"


def _gains(preset: Preset) -> str:
    return "; ".join(_gain(result) for result in preset.results if result.gain is not None) or "recipe only"


def _gain(result: Result) -> str:
    interval = "" if result.interval is None else f" [{result.interval[0]:+.2f}, {result.interval[1]:+.2f}]"
    return f"{result.task}: {result.gain:+.2f}{interval}"


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ("---",) * len(heads), *rows))


def _text(text: str) -> str:
    return f"```text\n{text}\n```"
