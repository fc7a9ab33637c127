"""JSON text that every JSON parser accepts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any


def json_text(values: dict) -> str:
    """Format a JSON object in ASCII; NaN and infinities, which JSON does not have, become null."""
    return json.dumps(_finite(values), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_object(content: bytes) -> dict:
    """The JSON object in a file's content; empty if it is none."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def values_of(key: str, values: Any) -> Iterator[Any]:
    """The values of a key in a JSON value, at every level."""
    waiting = [values]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict) and key in each:
            yield each[key]
        waiting += each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()


def without_key(key: str, values: Any) -> Any:
    """A JSON value without a key, at every level."""
    if isinstance(values, dict):
        return {name: without_key(key, each) for name, each in values.items() if name != key}
    return [without_key(key, each) for each in values] if isinstance(values, list) else values
