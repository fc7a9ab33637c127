"""JSON as every reader takes it."""

from __future__ import annotations

import json
import math
from typing import Any


def json_text(values: dict) -> str:
    """A JSON object as text, in ASCII; a number that JSON cannot spell, NaN or an infinity, becomes null."""
    return json.dumps(_finite(values), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
