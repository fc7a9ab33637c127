"""What a part finds: one case after the other, each a flat dictionary that becomes a line of JSON.

`status` is one of: "passed" and "failed" (a comparison), "measured" (figures), "skipped" (with a `reason`), "error" and
"timeout" (with an `error`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

Result = dict[str, Any]

MAX_ERROR_CHARS = 600


def compared(difference: float, allowed: float, **figures) -> Result:
    """The result of a comparison; a difference that is not a number has failed."""
    status = "passed" if difference <= allowed else "failed"
    return {"status": status, "difference": short(difference), "allowed": short(allowed), **figures}


def measured(**figures) -> Result:
    """The result of a measurement."""
    return {"status": "measured", **figures}


def skipped(reason: str) -> Result:
    """The result of a case that does not apply here."""
    return {"status": "skipped", "reason": reason}


def failure(error: BaseException) -> Result:
    """The result of a case that raised an exception."""
    text = f"{type(error).__name__}: {error}"
    return {"status": "error", "error": " ".join(text.split())[:MAX_ERROR_CHARS]}


def attempt(case: str, action: Callable[[], Result]) -> Result:
    """Run one case; an exception is its result, so that the part goes on."""
    start = time.perf_counter()
    try:
        result = action()
    except Exception as error:  # whatever a runtime raises is what we want to know
        result = failure(error)
    return {"case": case, **result, "seconds": round(time.perf_counter() - start, 2)}


def attempt_all(case: str, action: Callable[[], Iterator[Result]]) -> Iterator[Result]:
    """Run cases that share what takes long to make; if that fails, the rest is one error."""
    start = time.perf_counter()
    try:
        for result in action():
            yield {**result, "case": f"{case} {result['case']}"}
    except Exception as error:
        yield {"case": case, **failure(error), "seconds": round(time.perf_counter() - start, 2)}


def short(number: float) -> float:
    """A number with three significant digits, which is all that a figure here is good for."""
    return float(f"{number:.3g}")
