"""Answer a misspelt keyword with the nearest keyword of the same function."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from loopexport.errors import KeywordError, nearest

P = ParamSpec("P")
R = TypeVar("R")


def suggest_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function raise `KeywordError` for a keyword that it does not take. The signature stays the same."""
    known = tuple(name for name in inspect.signature(function).parameters if name != "self")

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                raise KeywordError(_explanation(function.__qualname__, name, known))
        return function(*args, **kwargs)

    return checked


def _explanation(function: str, name: str, known: tuple[str, ...]) -> str:
    near = nearest(name, known)
    hint = f"did you mean {near!r}?" if near else f"it takes {', '.join(known)}"
    return f"{function.removesuffix('.__init__')}() takes no keyword {name!r}; {hint}"
