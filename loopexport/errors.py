"""Errors that LoopExport raises on purpose. Each message names the value given, what is allowed, and what to do next.

LoopExportError
├── SpecError           the loop is impossible, in general or for this model
├── CheckpointError     the base cannot be read, or cannot be looped
├── HubError            the Hub refused or cannot be reached
├── PushError           an export cannot be pushed in its present state
├── OutputError         the output cannot be written
├── ExportError         a directory is not an export, or is damaged
├── EvaluationError     a comparison cannot run, or its results are of other settings
├── KeywordError        a function does not take this keyword (also a TypeError)
└── OnnxError           ONNX export failed, or an ONNX graph cannot run
    └── OnnxInputError  an input or a sampling option is not allowed (also a ValueError)
"""

from __future__ import annotations


class LoopExportError(Exception):
    """Base class. The command line turns it into one line on stderr and exit status 1."""


class SpecError(LoopExportError):
    """The loop specification is impossible."""


class CheckpointError(LoopExportError):
    """The base checkpoint cannot be read or looped."""


class HubError(LoopExportError):
    """A repository on the Hub cannot be read or written."""


class PushError(LoopExportError):
    """An export cannot be pushed, or does not fit the repository."""


class OutputError(LoopExportError):
    """The output cannot be written."""


class ExportError(LoopExportError):
    """A directory is not an intact LoopExport export."""


class EvaluationError(LoopExportError):
    """A loop and its base cannot be compared."""


class KeywordError(LoopExportError, TypeError):
    """A function of LoopExport was called with a keyword that it does not take."""


class OnnxError(LoopExportError):
    """A model cannot be exported to ONNX, or its graph cannot run."""


class OnnxInputError(OnnxError, ValueError):
    """The tokens for a graph, or the sampling options, are not allowed."""


def one_line(text: object, max_chars: int | None = None) -> str:
    """The text of an error on one line: every run of white space becomes a space.

    Args:
        text: an exception, or text.
        max_chars: where to cut a longer text; None keeps all of it.
    """
    line = " ".join(str(text).split())
    return line if max_chars is None or len(line) <= max_chars else f"{line[:max_chars]} ..."


def first_line(error: BaseException) -> str:
    """The first line of an error. The Hub's client puts advice on the lines below."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def nearest(word: object, words: tuple[str, ...]) -> str | None:
    """The one of `words` that `word` most resembles; None where none comes close."""
    from difflib import get_close_matches

    return next(iter(get_close_matches(str(word), words, 1)), None)
