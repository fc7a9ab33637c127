"""The loop spec as users write it: flags, keywords or a YAML file.

`templates/looped_spec.py` defines `LoopSpec` itself, with the meaning and the allowed values of each field, because
exports need it.
"""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from loopexport.errors import SpecError, nearest
from loopexport.templates.looped_spec import DECODE_MODES, KV_POLICIES, MODES, RULES, LoopSpec, Steps

from .auto_span import AUTO
from .path import parse_path

__all__ = [
    "DECODE_MODES",
    "KV_POLICIES",
    "MODES",
    "RULES",
    "LoopSpec",
    "Steps",
    "make_spec",
    "parse_span",
    "read_spec_file",
]

SPEC_KEYS = tuple(field.name for field in fields(LoopSpec))
# Which layers loop: one of these says it. The last two are no fields of a spec, but written as other tools do.
PLACES = ("span", "path", "rys", "from_mergekit")
FILE_KEYS = (*SPEC_KEYS, *PLACES[2:], "preset")

_HALF_OPEN = re.compile(r"(-?[0-9]{1,9}):(-?[0-9]{1,9})(?:\s*x\s*([0-9]{1,9}))?")
_INCLUSIVE = re.compile(r"([0-9]{1,9})\s*-\s*([0-9]{1,9})(?:\s*(x)\s*([0-9]{1,9}))?")


def parse_steps(text: str) -> tuple[tuple[int, int], int | None]:
    """Parse a span that may have its own number of steps, `START:STOPxK`.

    Raises:
        SpecError: it is written in another way; for an inclusive `A-B`, the message gives the right spelling.
    """
    half_open = _HALF_OPEN.fullmatch(text.strip())
    if half_open is None:
        raise SpecError(_misspelt(text, "START:STOP or START:STOPxK, such as 12:20 or 12:20x3 (half-open, from 0)"))
    start, stop, steps = half_open.groups()
    return (int(start), int(stop)), None if steps is None else int(steps)


def parse_span(text: str) -> tuple[int, int]:
    """Parse a span without its number of steps: `START:STOP`, half-open, with layers counted from 0.

    Raises:
        SpecError: it is written in another way; for an inclusive `A-B`, the message gives the right spelling.
    """
    half_open = _HALF_OPEN.fullmatch(text.strip())
    if half_open is None or half_open[3] is not None:
        raise SpecError(_misspelt(text, "START:STOP, two layer numbers such as 12:20 (half-open, from 0)"))
    return int(half_open[1]), int(half_open[2])


def _misspelt(text: str, allowed: str) -> str:
    inclusive = _INCLUSIVE.fullmatch(text.strip())
    if inclusive is None:
        return f"span {text!r} is not {allowed}"
    start, last, times, steps = inclusive.groups("")
    right = f"{int(start)}:{int(last) + 1}{times}{steps}"
    return f"span {text!r} is ambiguous; for layers {int(start)} to {int(last)} write {right} (half-open)"


def make_spec(**values) -> LoopSpec:
    """Make a `LoopSpec` from its fields; a span may be a pair or a string such as "12:20" or "12:20x3".

    A path may be a string too, such as "0-14,12-39"; its default K/V policy is per_step, as in a model with repeated
    layers.

    Raises:
        SpecError: a key is unknown or missing, or a value is not allowed.
    """
    _check_keys(values)
    missing = missing_field(values)
    if missing:
        raise SpecError(missing)
    values |= _span_fields(values) if values.get("path") is None else _path_fields(values)
    if isinstance(values.get("schedule"), str):
        values["schedule"] = _parse_numbers(values["schedule"])
    try:
        return LoopSpec(**values)
    except ValueError as error:
        raise SpecError(str(error)) from None


def missing_field(values: dict) -> str | None:
    """Which field without a default is missing, and how to give it, in one line; None if both are there.

    Raises:
        SpecError: a span is misspelt, so it may have steps that nobody can read.
    """
    if any(values.get(place) is not None for place in PLACES if place != "span"):
        return None
    span = values.get("span")
    if span is None:
        return (
            "the loop spec has no span; give one, such as --span 12:20 (in Python span=...), or a preset, or say it in "
            "another way: --path, --rys or --from-mergekit"
        )
    steps_in_spans = [parse_steps(each)[1] for each in _spans_in(span) if isinstance(each, str) and each != AUTO]
    if values.get("steps") is None and not any(steps is not None for steps in steps_in_spans):
        return "the loop spec has no steps; give one, such as --steps 4 (in Python steps=...), or a preset"
    return None


def check_first_n(spec: LoopSpec, is_given: bool) -> None:
    """Raise SpecError if only one of `first_n` and decode first_n was given; a config may be edited one at a time."""
    if spec.decode == "first_n" and not is_given:
        raise SpecError("decode first_n needs first_n, the number of decode steps that loop, such as 8")
    if spec.first_n and spec.decode != "first_n":
        raise SpecError(f"first_n {spec.first_n} needs decode first_n, not {spec.decode}; set it, or leave first_n out")


def _check_keys(values: dict, known: tuple[str, ...] = SPEC_KEYS) -> None:
    unknown = [key for key in values if key not in known]
    if unknown:
        near = nearest(unknown[0], known)
        hint = f"did you mean {near!r}?" if near else f"the keys are {', '.join(known)}"
        raise SpecError(f"unknown key {unknown[0]!r} in the loop spec; {hint}")


def _span_fields(values: dict) -> dict:
    """The span and the steps of a spec, with strings parsed."""
    span, steps = values.get("span"), values.get("steps")
    given = _spans_in(span)
    if not any(isinstance(each, str) for each in given):
        return {"span": span, "steps": steps}
    parsed = [parse_steps(each) if isinstance(each, str) else (each, None) for each in given]
    own = [count for _, count in parsed if count is not None]
    if own and steps is not None:
        raise SpecError(f"steps {steps} and a span with its own number of steps were given; give one of them")
    if own and len(own) < len(parsed):
        raise SpecError("one span has its own number of steps, and another has not; write all of them as 8:12x2")
    return {"span": [bounds for bounds, _ in parsed], "steps": own or steps}


def has_own_steps(span) -> bool:
    """Whether a span, or one of several, has its own number of steps, as in "8:12x2"."""
    found = [_HALF_OPEN.fullmatch(each.strip()) for each in _spans_in(span) if isinstance(each, str)]
    return any(match is not None and match[3] is not None for match in found)


def _spans_in(span) -> list | tuple:
    """A span as users give it, or several, as a list."""
    return span if isinstance(span, (list, tuple)) else [span]


def _path_fields(values: dict) -> dict:
    """The fields of a spec that has a path, with its defaults: layers run again as in a model that repeats them."""
    if values.get("span") is not None:
        raise SpecError("the loop has a span and a path; give one of them")
    defaults = {"steps": 2, "kv": "per_step"}
    missing = {name: value for name, value in defaults.items() if values.get(name) is None}
    return {"span": None, "path": parse_path(values["path"]), **missing}


def _parse_numbers(text: str) -> list[float]:
    try:
        return [float(each) for each in text.split(",")]
    except ValueError:
        raise SpecError(f"schedule {text!r} is not a list of numbers such as 0.5,0.3,0.2") from None


def read_spec_file(path: Path) -> dict:
    """Read a YAML spec file; its keys are the fields of `LoopSpec`, `rys`, `from_mergekit` and `preset`.

    A relative path of a mergekit config starts at the directory of the spec file.

    Raises:
        SpecError: the file cannot be read, is not a mapping, or has an unknown key.
    """
    from loopexport.files.yaml_text import SpecLoader, load_yaml

    try:
        values = load_yaml(path.read_text(encoding="utf-8"), SpecLoader)
    except OSError as error:
        raise SpecError(f"cannot read spec file {path}: {error.strerror}") from None
    except ValueError as error:
        raise SpecError(f"spec file {path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise SpecError(f"spec file {path} is not a mapping; write lines such as `span: 12:20` and `steps: 4`")
    _check_keys(values, FILE_KEYS)
    config = values.get("from_mergekit")
    return {**values, "from_mergekit": path.parent / config} if config and isinstance(config, str) else values
