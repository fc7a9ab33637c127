"""Paths through the layers as users write them, and the spans that a path is equal to."""

from __future__ import annotations

import re
from dataclasses import replace

from loopexport.errors import SpecError
from loopexport.templates.looped_path import detours_of, joined_runs
from loopexport.templates.looped_spec import LoopSpec

Run = tuple[int, int]  # half-open


def parse_path(text: str) -> tuple[Run, ...]:
    """Parse a path: runs of layers, with commas between them.

    `0-14` and `0..14` include layer 14, `0:15` does not; a single number is one layer.

    Raises:
        SpecError: it is written in another way, or a run goes backwards.
    """
    return tuple(_parse_run(part, text) for part in text.split(","))


def _parse_run(part: str, text: str) -> Run:
    match = re.fullmatch(r"(\d{1,9})(?:\s*(-|\.\.|:)\s*(\d{1,9}))?", part.strip())
    if match is None:
        raise SpecError(
            f"path {text!r} has {part.strip()!r}, which is no run of layers; write 0-14,12-39 (with the last layer) or "
            "0:15,12:40 (without it)"
        )
    start = int(match[1])
    if match[2] is None:
        return start, start + 1
    stop = int(match[3]) + (0 if match[2] == ":" else 1)
    if stop <= start:
        raise SpecError(f"path {text!r} has {part.strip()!r}, which goes backwards or is empty; runs go up")
    return start, stop


def with_spans(spec: LoopSpec, num_layers: int) -> LoopSpec:
    """The same loop, by spans instead of a path if spans can express it in a model of `num_layers` layers."""
    if spec.path is None or spec.is_identity or spec.skipped(num_layers):
        return spec
    spans = _spans_of(spec.path)
    if not spans:
        return spec
    bounds, steps = zip(*spans, strict=True)
    return replace(spec, path=None, span=bounds, steps=steps, damping=1.0)


def _spans_of(path: tuple[Run, ...]) -> list[tuple[Run, int]]:
    """The spans, with their steps, that visit the same layers in the same order; none if spans cannot."""
    spans: list[tuple[Run, int]] = []
    for after, detour in detours_of(path):
        start, count = detour[0], 1 + len(detour) // (after + 1 - detour[0])
        is_repeated = joined_runs(detour) == ((start, after + 1),) * (count - 1)
        if not is_repeated or (spans and start < spans[-1][0][1]):
            return []
        spans.append(((start, after + 1), count))
    return spans
