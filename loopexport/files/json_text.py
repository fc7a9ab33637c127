"""JSON text that every JSON parser accepts."""

from __future__ import annotations

import json
import math
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
