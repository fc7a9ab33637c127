"""Paths through the layers as users write them, and the spans that a path is equal to."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from loopexport.errors import SpecError
from loopexport.templates.looped_path import detours_of, joined_runs
from loopexport.templates.looped_spec import LoopSpec

Run = tuple[int, int]  # half-open

HOW = "write 0-14,12-39 (with the last layer) or 0:15,12:40 (without it)"


def parse_path(path) -> tuple[Run, ...]:
    """Parse a path: runs of layers, as text with commas between them or as a list.

    `0-14` and `0..14` include layer 14, `0:15` and the pair (0, 15) in a list do not; a single number is one layer. RYS
    writes `layers:` before its lists.

    Raises:
        SpecError: it is written in another way, a run goes backwards, or it is a pair that may be a run or two layers.
    """
    if isinstance(path, str):
        return tuple(_parse_run(part.strip(), path) for part in path.removeprefix("layers:").split(","))
    if not isinstance(path, Sequence) or isinstance(path, (bytes, bytearray)) or not path:
        raise SpecError(f"path {path!r} is no list of layers; {HOW}")
    if len(path) == 2 and all(map(_is_layer, path)) and path[1] != path[0] + 1:
        start, stop = path
        raise SpecError(
            f"path {path!r} may be one run or two layers: write [({start}, {stop})] for the half-open run, or "
            f"'{start},{stop}' for layers {start} and {stop}"
        )
    return tuple(run for part in path for run in _runs_in(part, path))


def _runs_in(part, path) -> Iterator[Run]:
    """The runs in one entry of a list: text, a layer number, or a half-open pair."""
    if isinstance(part, str):
        yield from parse_path(part)
    elif _is_layer(part):
        yield part, part + 1
    elif isinstance(part, (list, tuple)) and len(part) == 2 and all(map(_is_layer, part)):
        yield _checked(part[0], part[1], f"{part[0]}:{part[1]}", path)
    else:
        raise SpecError(f"path {path!r} has {part!r}, which is no run of layers; {HOW}")


def _parse_run(part: str, path: str) -> Run:
    match = re.fullmatch(r"([0-9]{1,9})(?:\s*(-|\.\.|:)\s*([0-9]{1,9}))?", part)
    if match is None:
        raise SpecError(f"path {path!r} has {part!r}, which is no run of layers; {HOW}")
    start = int(match[1])
    if match[2] is None:
        return start, start + 1
    return _checked(start, int(match[3]) + (0 if match[2] == ":" else 1), part, path)


def _checked(start: int, stop: int, part: str, path) -> Run:
    if stop <= start:
        raise SpecError(f"path {path!r} has {part!r}, which goes backwards or is empty; write the smaller layer first")
    return start, stop


def _is_layer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def with_spans(spec: LoopSpec, num_layers: int) -> LoopSpec:
    """The same loop, by spans instead of a path if spans can express it in a model of `num_layers` layers.

    Raises:
        SpecError: the path is the base model's own.
    """
    if spec.path is None or spec.is_identity or spec.skipped(num_layers):
        return spec
    if spec.path == ((0, num_layers),):
        raise SpecError(
            f"the path 0-{num_layers - 1} runs every layer once, as the base model does; repeat layers, as in "
            "0-14,12-39, or leave some out"
        )
    spans = _spans_of(spec.path)
    if not spans:
        return spec
    by_layer = _joined_layers(spans)
    bounds, steps = zip(*(by_layer or spans), strict=True)
    mode = "layer" if by_layer else "block"
    return replace(spec, path=None, span=bounds, steps=steps, damping=1.0, mode=mode)


def _spans_of(path: tuple[Run, ...]) -> list[tuple[Run, int]]:
    """The spans, with their steps, that visit the same layers in the same order; none if spans cannot."""
    spans: list[tuple[Run, int]] = []
    for after, detour in detours_of(path):
        span = (detour[0], after + 1)
        repeats = len(detour) // (after + 1 - detour[0])
        if joined_runs(detour) != (span,) * repeats or (spans and span[0] < spans[-1][0][1]):
            return []
        spans.append((span, 1 + repeats))
    return spans


def _joined_layers(spans: list[tuple[Run, int]]) -> list[tuple[Run, int]]:
    """Neighbouring spans of one layer each as one span in layer mode; none if there are no such neighbours."""
    joined: list[tuple[Run, int]] = []
    for (start, stop), steps in spans:
        if joined and joined[-1][0][1] == start and joined[-1][1] == steps:
            start = joined.pop()[0][0]
        joined.append(((start, stop), steps))
    return joined if len(joined) < len(spans) and all(stop == start + 1 for (start, stop), _ in spans) else []
