"""Print lines for people, or one JSON object for programs."""

from __future__ import annotations

import click

from loopexport.files.json_text import json_text

NOTHING_WRITTEN = "Dry run: nothing was written."


def echo_lines(lines: list[str]) -> None:
    """Print lines on stdout."""
    for line in lines:
        echo_line(line)


def echo_line(text: str, err: bool = False) -> None:
    """Print one line. Line ends and terminal commands in names and values of other people are escaped."""
    printable = (char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    click.echo("".join(printable), err=err)


def echo_json(values: dict) -> None:
    """Print an object as JSON on stdout."""
    click.echo(json_text(values), nl=False)


def echo_note(line: str) -> None:
    """Print a note on stderr."""
    echo_line(f"Note: {line}", err=True)
