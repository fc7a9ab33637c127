"""The measured results of an export, for its card: a section of text, and metadata for the Hub."""

from __future__ import annotations

import re
from typing import Any

from loopexport.loop.wording import describe_loop

from .foreign_text import MAX_CHARS, markdown_code, markdown_text, printable
from .results_file import RESULTS, Measured, RecordedResult, TaskResult

NOT_MEASURED = """\
Not measured. Compare this model with its base, where DIR is this directory:

```sh
loopexport compare DIR --tasks TASKS --save
```"""
HARNESS = {"name": "lm-evaluation-harness", "url": "https://github.com/EleutherAI/lm-evaluation-harness"}

HEAD = """\
| task | metric | n | base | looped | difference [interval] | verdict | date |
| --- | --- | --- | --- | --- | --- | --- | --- |"""
MAX_ROWS = 100
MODEL_INDEX = "model-index"  # the key of results in metadata of the Hub


def results_section(results: Measured) -> str:
    """The section that says whether the loop helped, with losses and what is not known."""
    rows = _rows(results.own)
    parts = [_table(rows), _sentences(rows), _settings(results.own)] if rows else [NOT_MEASURED]
    parts = ["## Does the loop help?", *parts, _others(results.other)]
    return "\n\n".join(filter(None, parts)) + "\n"


def model_index(name: str, results: tuple[RecordedResult, ...]) -> dict:
    """The `model-index` metadata of the Hub, by key; empty without results.

    Source: the Hub accepts only word characters, dots and hyphens as the type of a dataset.
    """
    entries = [_index_entry(result, task) for result, task in _rows(results)]
    return (
        {MODEL_INDEX: [{"name": f"{printable(name.rsplit('/', 1)[-1])}, looped", "results": entries}]}
        if entries
        else {}
    )


def _rows(results: tuple[RecordedResult, ...]) -> list[tuple[RecordedResult, TaskResult]]:
    """All tasks with their results: in each result, groups come first."""
    return [(result, task) for result in results for task in sorted(result.tasks, key=lambda task: not task.is_group)]


def _table(rows: list[tuple[RecordedResult, TaskResult]]) -> str:
    table = "\n".join([HEAD, *(_line(result, task) for result, task in rows[:MAX_ROWS])])
    more = len(rows) - MAX_ROWS
    return table + (f"\n\n`{RESULTS}` has {more} more." if more > 0 else "")


def _line(result: RecordedResult, task: TaskResult) -> str:
    name = markdown_text(task.name) + (" (group)" if task.is_group else "")
    cells = [name, markdown_text(task.metric), f"{task.n:,}", _score(task.base), _score(task.loop)]
    return f"| {' | '.join([*cells, difference_text(task), task.verdict, result.date])} |"


def difference_text(task: TaskResult) -> str:
    """The difference of a task with its interval, such as `+0.0200 [-0.0200, +0.0600]`."""
    return f"{task.difference:+.4f}{_interval(task)}"


def _interval(task: TaskResult) -> str:
    return "" if task.low is None else f" [{task.low:+.4f}, {task.high:+.4f}]"


def _score(value: float) -> str:
    return f"{value:.4f}"


def _sentences(rows: list[tuple[RecordedResult, TaskResult]]) -> str:
    """A sentence for each row without a clear outcome, and for each with answers that were NaN."""
    shown = [task for _, task in rows[:MAX_ROWS]]
    unclear = [inconclusive_text(task) for task in shown if task.verdict == "inconclusive"]
    nan = [_nan_text(task) for task in shown if task.base_nan or task.loop_nan]
    return "\n".join(f"- {each}" for each in [*unclear, *nan])


def _nan_text(task: TaskResult) -> str:
    """How many answers were NaN, in Markdown; a score of 0 may be an overflow, and no wrong answer."""
    counts = [f"{count:,} of the {arm}" for arm, count in (("base", task.base_nan), ("loop", task.loop_nan)) if count]
    return f"{markdown_text(task.name)}: some answers were NaN and counted as wrong, {' and '.join(counts)}."


def inconclusive_text(task: TaskResult) -> str:
    """What an inconclusive result leaves open, in Markdown."""
    text = f"{markdown_text(task.name)}: {task.n:,} items do not show whether the loop helps"
    if task.low is not None and task.high is not None and not task.low <= 0 <= task.high:
        p = task.p if task.p_holm is None else task.p_holm
        text += "; the interval excludes zero" + ("" if p is None else f", but p is {p:.2g}")
    if task.smallest_difference is not None:
        text += f"; they find a difference of {task.smallest_difference:.4f} with 80 % power"
    if task.items_needed is not None:
        text += f", and about {task.items_needed:,} would find the {task.difference:+.4f} observed"
    return f"{text}."


def _settings(results: tuple[RecordedResult, ...]) -> str:
    return "\n\n".join(dict.fromkeys(map(_settings_line, results)))


def _settings_line(result: RecordedResult) -> str:
    """How a result was measured, on one line."""
    settings = {**_given(result), "seeds": ", ".join(map(str, result.seeds))}
    where = " on ".join(map(markdown_text, (result.dtype, result.device)))
    return (
        f"{markdown_code(_names(result))} on {result.date}: LoopExport {markdown_text(result.loopexport)}, "
        f"{_named(result.versions)}, {markdown_text(result.backend)} in {where}; {_named(settings)}{_level(result)}."
    )


def _names(result: RecordedResult) -> str:
    """The groups of a result, or its tasks if it has no group."""
    groups = dict.fromkeys(task.name for task in result.tasks if task.is_group)
    return ", ".join(groups or dict.fromkeys(task.name for task in result.tasks))


def _level(result: RecordedResult) -> str:
    levels = sorted({task.confidence for task in result.tasks if task.confidence is not None})
    return f"; intervals of {' and '.join(f'{100 * level:g} %' for level in levels)}" if levels else ""


def _given(result: RecordedResult) -> dict:
    """The settings that have a value: numbers as they are, others as text."""
    return {name: _shown(each) for name, each in result.settings.items() if each is not None}


def _shown(value: Any) -> Any:
    """A setting as a number, or on one line; repr escapes what does not print, such as a line break."""
    if isinstance(value, (int, float)):
        return value
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= MAX_CHARS else f"{text[: MAX_CHARS - 3]}..."


def _named(values: dict) -> str:
    return ", ".join(f"{markdown_text(name)} {markdown_text(str(value))}" for name, value in values.items())


def _others(results: tuple[RecordedResult, ...]) -> str:
    """Results that say nothing about the export as it is now."""
    if not results:
        return ""
    lines = [
        f"- {markdown_text(task.name)}, {describe_loop(result.spec)}, {result.date}: "
        f"{difference_text(task)}, {task.verdict}"
        for result, task in _rows(results)[:MAX_ROWS]
    ]
    return "\n".join(["Measured with another loop or other weights, and not a result of this model:\n", *lines])


def _index_entry(result: RecordedResult, task: TaskResult) -> dict:
    kind = _word(task.metric)
    interval = f", {100 * (task.confidence or 0):g} % interval{_interval(task)}" if _interval(task) else ""
    scores = {
        task.metric: task.loop,
        f"{task.metric} of the base": task.base,
        f"difference of {task.metric}{interval}": task.difference,
    }
    return {
        "task": {"type": "text-generation", "name": "Text Generation"},
        "dataset": {
            "name": f"{task.name}, {task.n:,} items",
            "type": _word(task.name),
            "args": {**_given(result), "n": task.n},
        },
        "metrics": [{"type": kind, "value": value, "name": name, "verified": False} for name, value in scores.items()],
        "source": dict(HARNESS),  # YAML would refer to an object that comes twice
    }


def _word(text: str) -> str:
    """Text as a type on the Hub."""
    return re.sub(r"[^\w.-]", "_", text, flags=re.ASCII)
