"""Text of strangers in a card: names and words from a base, a directory or a manifest.

Each function says for one language how such text is written, so that it can be nothing but text there.
"""

from __future__ import annotations

import json
import re

MAX_CHARS = 200
REPLACEMENT = "\ufffd"

# Words joined by single marks, without any character or pattern (such as www.) that Markdown gives a meaning.
_ORDINARY = re.compile(r"[A-Za-z0-9]+(([ _/+-]|\.(?=[0-9]))[A-Za-z0-9]+)*")


def printable(text: str) -> str:
    """The text on one line: each character that does not print becomes a replacement character."""
    return "".join(char if char.isprintable() else REPLACEMENT for char in text)


def markdown_text(text: str) -> str:
    """Markdown for text within a sentence: ordinary words as they are, anything else as code."""
    return text if len(text) <= MAX_CHARS and _ORDINARY.fullmatch(text) else markdown_code(text)


def markdown_code(text: str) -> str:
    """Markdown for text as code, in a sentence or a cell of a table; at most `MAX_CHARS` characters of it."""
    # Markdown implementations do not agree on how to write a pipe in a cell.
    line = printable(text[:MAX_CHARS]).replace("|", REPLACEMENT)
    ticks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if not line.strip() or line[0] in "` " or line[-1] in "` " else ""
    return f"{ticks}{space}{line}{space}{ticks}"


def python_literal(text: str) -> str:
    """A Python string literal on one line, in double quotes."""
    return '"' + "".join(map(_python_char, text)) + '"'


def _python_char(char: str) -> str:
    if char in '"\\':
        return f"\\{char}"
    return char if char.isprintable() else char.encode("unicode_escape").decode()


def javascript_literal(text: str) -> str:
    """A JavaScript string literal on one line, in double quotes and in ASCII."""
    return json.dumps(text)
