"""Helpers for tests that use or damage an export with ONNX graphs."""

from __future__ import annotations

from support.commands import run

VOCAB = 300  # the vocabulary of `small_tokenizer`


def refused(*arguments):
    """Run a command that must fail; its error line."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    return line
