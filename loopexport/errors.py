"""What can go wrong for a known reason. Each message names the value given, what is allowed, and what to do next.

LoopExportError
├── SpecError           the loop is not possible, in itself or on this model
├── CheckpointError     the base cannot be read, or is of a kind that cannot be looped
├── HubError            the Hub refused, or cannot be reached
├── PushError           an export must not, or cannot, be pushed as it is
├── OutputError         the output cannot be written where it was asked for
├── ExportError         a directory is not an export, or is a damaged one
└── OnnxError           the model cannot be exported to ONNX, or its ONNX files cannot be run
    └── OnnxInputError  a graph is asked to run what it cannot; a ValueError too
"""

from __future__ import annotations


class LoopExportError(Exception):
    """Base of all errors that LoopExport raises on purpose; `cli.py` turns it into one line and exit status 1."""


class SpecError(LoopExportError):
    """The loop specification is not possible."""


class CheckpointError(LoopExportError):
    """The base checkpoint cannot be read or looped."""


class HubError(LoopExportError):
    """A repository on the Hub cannot be read or written."""


class PushError(LoopExportError):
    """An export must not leave the machine as it is, or does not fit where it is to go."""


class OutputError(LoopExportError):
    """The output directory cannot be written."""


class ExportError(LoopExportError):
    """A directory is not an intact LoopExport export."""


class OnnxError(LoopExportError):
    """A model cannot be exported to, or run with, ONNX."""


class OnnxInputError(OnnxError, ValueError):
    """What a graph is to run, or how its tokens are to be chosen, is not possible."""
