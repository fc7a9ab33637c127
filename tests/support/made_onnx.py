"""An export with ONNX graphs that tests use and spoil."""

from __future__ import annotations

from support.commands import run

VOCAB = 300  # as many as the tokenizer has


def refused(*arguments):
    """The one line that a command ends with."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    return line


def contents(root):
    return {path.name: path.read_text() for path in root.iterdir()}
