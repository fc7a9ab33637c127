"""A comparison of a loop with its base as lines of text."""

from __future__ import annotations

from collections.abc import Sequence

from loopexport.evaluation.noise import Floor
from loopexport.evaluation.verdict_text import (
    floor_sentence,
    headline,
    holm_sentence,
    label,
    length_sentence,
    nan_sentence,
    noise_sentence,
    p_text,
    score,
    sentence,
    signed,
)
from loopexport.evaluation.verdicts import Comparison

_HEADINGS = ("task", "metric", "items", "base", "loop", "difference", "95 % interval", "gained", "lost", "p")
_LEFT = 2  # columns of words; numbers are aligned to the right


def comparison_lines(rows: Sequence[Comparison], floor: Floor | None) -> list[str]:
    """A table, what it means for each row, the floor, and the answer."""
    notes = [holm_sentence(rows), floor_sentence(floor)]
    return [
        *aligned([_HEADINGS, *map(_cells, rows)]),
        "",
        *(line for row in rows for line in _row_lines(row, label(row, rows))),
        "",
        *filter(None, notes),
        headline(rows),
    ]


def _cells(row: Comparison) -> tuple[str, ...]:
    return (
        f"{row.name} (group)" if row.is_group else row.name,
        row.metric,
        f"{row.n:,}" if row.seeds == 1 else f"{row.n:,} x {row.seeds}",
        score(row, row.base),
        score(row, row.loop),
        signed(row, row.difference),
        f"{signed(row, row.low)} to {signed(row, row.high)}",
        str(row.gained),
        str(row.lost),
        p_text(row),
    )


def aligned(table: list[tuple[str, ...]]) -> list[str]:
    """The rows of a table as lines, with words to the left and numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(_padded(cell, widths[i], i < _LEFT) for i, cell in enumerate(row)).rstrip() for row in table]


def _padded(cell: str, width: int, is_left: bool) -> str:
    return f"{cell:<{width}}" if is_left else f"{cell:>{width}}"


def _row_lines(row: Comparison, name: str) -> list[str]:
    details = (length_sentence(row), noise_sentence(row), nan_sentence(row))
    return [f"{name}: {sentence(row)}", *(f"  {each}" for each in details if each)]
