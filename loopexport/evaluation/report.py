"""The report of a comparison: one HTML file that loads nothing, and its forest plot."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from loopexport.files.staged_files import exactly, staged_files

from .html import element, page
from .items import Answer, Pair
from .noise import Floor
from .plots import DARK, forest_png
from .verdict_text import (
    can_show,
    floor_sentence,
    headline,
    holm_sentence,
    label,
    length_sentence,
    method_sentence,
    nan_sentence,
    noise_sentence,
    p_text,
    score,
    sentence,
    signed,
)
from .verdicts import Comparison

REPORT, FOREST = "report.html", "forest.png"
MAX_FLIPS = 100  # of one task; a page of thousands is slow and nobody reads it
MAX_CHARS = 8000  # of one text
TITLE = "Does the loop help?"
_WORDS = ("task", "metric", "verdict")
_NUMBERS = ("items", "base", "loop", "difference", "95 % interval", "gained", "lost", "p", "can show")
_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1f2328; --line: #d0d7de; --soft: #f6f8fa;
  --better: #1a7f37; --worse: #cf222e; }
@media (prefers-color-scheme: dark) { :root { --back: #0d1117; --text: #e6edf3; --line: #30363d; --soft: #161b22;
  --better: #3fb950; --worse: #f85149; } }
body { background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 80rem; padding: 0 1rem; }
.answer { font-size: 1.25rem; font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { border-bottom: 1px solid var(--line); padding: .3rem .5rem; text-align: left; vertical-align: top; }
td, th, li, summary, pre { unicode-bidi: isolate; overflow-wrap: anywhere; }
th { overflow-wrap: normal; white-space: nowrap; }
.scroll td, .scroll th { overflow-wrap: normal; white-space: nowrap; }
.scroll .name { min-width: 8rem; overflow-wrap: anywhere; white-space: normal; }
.number { text-align: right; }
.better { color: var(--better); font-weight: 600; }
.worse { color: var(--worse); font-weight: 600; }
details { border-bottom: 1px solid var(--line); padding: .3rem 0; }
summary { cursor: pointer; }
pre { background: var(--soft); border: 1px solid var(--line); padding: .6rem; white-space: pre-wrap; }
img { max-width: min(100%, 52rem); }
"""


def write_report(
    directory: Path, rows: Sequence[Comparison], pairs: Iterable[Pair], settings: dict, floor: Floor | None
) -> None:
    """Write `report.html` and `forest.png` into a directory: both, or none. Older ones are replaced.

    Args:
        directory: an existing directory.
        rows: what `compare_pairs` found.
        pairs: the answers; the page shows those with different scores.
        settings: of the run, to show by name.
        floor: the base against itself.

    Raises:
        OutputError: the file system refused, or another run is writing into the directory.
    """
    contents = report_files(rows, pairs, settings, floor)
    with staged_files(directory, exactly(*contents), last=REPORT) as files:
        for name, content in contents.items():
            files.write(name, content)
        files.keep()


def report_files(
    rows: Sequence[Comparison], pairs: Iterable[Pair], settings: dict, floor: Floor | None
) -> dict[str, bytes]:
    """The contents of the report's files by name, the page last."""
    light, dark = forest_png(rows), forest_png(rows, DARK)
    body = [
        element("h1", TITLE),
        element("p", headline(rows), class_="answer"),
        _table(rows),
        element("p", " ".join(filter(None, [method_sentence(rows), holm_sentence(rows)]))),
        _row_notes(rows),
        _picture(light, dark),
        element("h2", "Noise"),
        element("p", floor_sentence(floor)),
        element("h2", "Items with different scores"),
        *_flips(pairs),
        element("h2", "Settings"),
        _settings_table(settings),
    ]
    return {FOREST: light, REPORT: page(TITLE, _STYLE, *body)}


def _table(rows: Sequence[Comparison]) -> Element:
    head = [*(element("th", name) for name in _WORDS), *(element("th", name, class_="number") for name in _NUMBERS)]
    table = element("table", *(element("tr", *cells) for cells in [head, *map(_cells, rows)]))
    return element("div", table, class_="scroll")


def _cells(row: Comparison) -> list[Element]:
    numbers = (
        f"{row.n:,}" if row.seeds == 1 else f"{row.n:,} x {row.seeds} seeds",
        score(row, row.base),
        score(row, row.loop),
        signed(row, row.difference),
        f"{signed(row, row.low)} to {signed(row, row.high)}",
        f"{row.gained:,}",
        f"{row.lost:,}",
        p_text(row),
        can_show(row),
    )
    return [
        element("td", f"{row.name} (group)" if row.is_group else row.name, class_="name"),
        element("td", row.metric),
        element("td", row.verdict, class_=row.verdict),
        *(element("td", number, class_="number") for number in numbers),
    ]


def _row_notes(rows: Sequence[Comparison]) -> Element:
    notes = [
        (f"{label(row, rows)}: {sentence(row)}", length_sentence(row), noise_sentence(row), nan_sentence(row))
        for row in rows
    ]
    return element("ul", *(element("li", f"{'; '.join(filter(None, each))}.") for each in notes))


def _picture(light: bytes, dark: bytes) -> Element:
    return element(
        "picture",
        element("source", srcset=_data_url(dark), media="(prefers-color-scheme: dark)"),
        element("img", src=_data_url(light), alt="The differences and their intervals, as in the table"),
    )


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{b64encode(png).decode('ascii')}"


def _settings_table(settings: dict) -> Element:
    lines = (
        element("tr", element("th", str(name)), element("td", _setting_text(value))) for name, value in settings.items()
    )
    return element("table", *lines)


def _setting_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _flips(pairs: Iterable[Pair]) -> list[Element]:
    """For each task, the items with different scores; closed until a reader opens one."""
    flips: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        if pair.difference:
            flips.setdefault((pair.task, pair.metric), []).append(pair)
    if not flips:
        return [element("p", "None.")]
    return [part for key, each in flips.items() for part in _task_flips(*key, each)]


def _task_flips(task: str, metric: str, flips: list[Pair]) -> list[Element]:
    shown = f", the first {MAX_FLIPS} of them here" if len(flips) > MAX_FLIPS else ""
    title = element("h3", f"{task} ({metric}): {len(flips):,}{shown}")
    return [title, *(_flip(pair) for pair in flips[:MAX_FLIPS])]


def _flip(pair: Pair) -> Element:
    side = "gained" if pair.difference > 0 else "lost"
    summary = f"{side}: item {pair.item}, seed {pair.seed}"
    texts = {"Prompt": pair.prompt, "Target": pair.target}
    answers = {"Base": pair.base, "Loop": pair.loop}
    return element(
        "details",
        element("summary", summary),
        *(part for name, text in texts.items() for part in _text(name, text)),
        *(part for name, answer in answers.items() for part in _text(_answer_title(name, answer), answer.text)),
    )


def _answer_title(name: str, answer: Answer) -> str:
    parts = [f"{name}, score {answer.score:g}"]
    if answer.loglikelihoods:
        parts.append("log-likelihoods " + ", ".join(f"{value:.3f}" for value in answer.loglikelihoods))
    if answer.tokens:
        parts.append(f"{answer.tokens:,} tokens{', cut at the limit' if answer.truncated else ''}")
    return "; ".join(parts)


def _text(title: str, text: str) -> tuple[Element, Element]:
    """A stranger's text below its title. Of a long one the end, where the question and the result are."""
    left_out = len(text) - MAX_CHARS
    note = f" (the last {MAX_CHARS:,} of {len(text):,} characters)" if left_out > 0 else ""
    return element("div", f"{title}{note}"), element("pre", text[-MAX_CHARS:])
