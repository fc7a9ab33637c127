"""Checks of single values of a loop's fields; `looped_spec` says which field has which check.

Every export has a copy of this file. It needs only the standard library. A check returns the value in its canonical
type, or raises ValueError with what is allowed.
"""

from __future__ import annotations

import math
from itertools import pairwise

from .looped_path import check_path, joined_runs, layers_of

MAX_COUNT = 2**31 - 1  # the limit for steps and other counts: far more than useful, and fits any integer type
MAX_PATH = 10_000  # the limit for visits of layers in a path


def check_span(value) -> tuple | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(each, (list, tuple)) for each in value):
        return check_bounds(value)
    spans = tuple(check_bounds(each) for each in value)
    for (start, stop), (next_start, next_stop) in pairwise(spans):
        if next_start < stop:
            raise ValueError(
                f"spans {start}:{stop} and {next_start}:{next_stop} overlap or are out of order; give them in order"
            )
    return spans if len(spans) > 1 else spans[0]


def check_bounds(value, what: str = "span") -> tuple[int, int]:
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(is_int(bound) for bound in value):
        raise ValueError(f"{what} {value!r} is not a pair of layer numbers [start, stop]")
    start, stop = value
    if start < 0:
        raise ValueError(f"{what} {start}:{stop} starts before the first layer, which is 0")
    if start >= stop:
        kind = "is empty" if start == stop else "is reversed"
        raise ValueError(f"{what} {start}:{stop} {kind}; give start:stop with start < stop (stop is not included)")
    return (start, stop)


def check_path_runs(value) -> tuple | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"path {value!r} is not a list of pairs of layer numbers [start, stop]")
    runs = tuple(check_bounds(each, "part of the path") for each in value)
    length = sum(stop - start for start, stop in runs)
    if length > MAX_PATH:
        raise ValueError(f"the path visits {length} layers; {MAX_PATH} are allowed")
    path = joined_runs(layers_of(runs))
    check_path(path)
    return path


def check_steps(value) -> int | tuple[int, ...]:
    if isinstance(value, (list, tuple)) and value:
        steps = tuple(_check_count_of_steps(each) for each in value)
        return steps if len(set(steps)) > 1 else steps[0]
    return _check_count_of_steps(value)


def _check_count_of_steps(value) -> int:
    if not is_count(value, least=1):
        raise ValueError(
            f"steps {value!r} must be a whole number from 1 (the base model) to {MAX_COUNT}, or one for each span"
        )
    return value


def check_damping(value) -> float | None:
    if value is None:
        return None
    if not is_number(value) or not 0 < value <= 1:
        raise ValueError(f"damping {value!r} must be a step size in (0, 1]; leave it out for the rule's default")
    return float(value)


def check_anchor(value) -> float:
    if not is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"anchor {value!r} must be a weight in [0, 1] (1 is the base model)")
    return float(value)


def check_first_n(value) -> int:
    if not is_count(value, least=0):
        raise ValueError(f"first_n {value!r} must be a whole number from 0 to {MAX_COUNT}")
    return value


def check_schedule_numbers(value) -> tuple[float, ...] | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not all(is_number(each) and 0 <= each <= 1 for each in value):
        raise ValueError(f"schedule {value!r} must be a list of numbers in [0, 1]")
    return tuple(float(each) for each in value)


def check_momentum(value) -> float | None:
    if value is None:
        return None
    if not is_number(value) or not 0 <= value < 1:
        raise ValueError(f"momentum {value!r} must be a number in [0, 1)")
    return float(value)


def check_history(value) -> int | None:
    if value is None:
        return None
    if not is_count(value, least=1):
        raise ValueError(f"history {value!r} must be a whole number from 1 to {MAX_COUNT}")
    return value


def one_of(name: str, allowed):
    def check(value) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"{name} {value!r} must be one of {', '.join(allowed)}")
        return value

    return check


def flag(name: str):
    def check(value) -> bool:
        if not isinstance(value, bool):
            raise ValueError(f"{name} {value!r} must be true or false")
        return value

    return check


def is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_count(value, least: int) -> bool:
    return is_int(value) and least <= value <= MAX_COUNT


def is_number(value) -> bool:
    return is_int(value) or (isinstance(value, float) and math.isfinite(value))
