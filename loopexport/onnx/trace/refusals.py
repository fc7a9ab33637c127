"""Turn any failure of a family's own code during tracing into a refusal that says why, in plain words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loopexport.errors import OnnxError, one_line

from .layer_copies import NotRepeatableError

# Errors that torch raises where the code branches on a tensor's values.
_DATA_DEPENDENT = ("DataDependentOutputException", "DynamicOutputShapeException")


@contextmanager
def family_refused(model: Any) -> Iterator[None]:
    """Raise every failure as an OnnxError about the model's family: it is a limit of the family, not a bug of ours."""
    try:
        yield
    except (OnnxError, NotRepeatableError):
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # the outer errors only say in which step it happened
            cause = cause.__cause__
        raise OnnxError(f"family {model.config.model_type!r} cannot be traced to ONNX: {_reason(cause)}") from error


def _reason(cause: BaseException) -> str:
    """Why tracing failed; torch's own messages speak of its internals."""
    text = one_line(cause)
    if "Constraints violated" in text:
        return "its code takes different paths for different numbers of tokens, of which a graph holds one"
    if "data-dependent" in text or type(cause).__name__ in _DATA_DEPENDENT:
        return "what its code does depends on values that it computed, and a graph does the same for all"
    operator = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", text)
    if operator:
        return f"ONNX has no {operator[1]}"
    return f"{type(cause).__name__}: {text[:300]}"
