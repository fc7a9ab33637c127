"""Print lines for people, or one JSON object for programs."""

from __future__ import annotations

import re

import click

from loopexport.files.json_text import json_text

# Characters that command a terminal or reorder its text. Others that do not print, such as joiners, belong to scripts.
TERMINAL_COMMANDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
NOTHING_WRITTEN = "Dry run: nothing was written."


def echo_lines(lines: list[str]) -> None:
    """Print lines on stdout."""
    for line in lines:
        echo_line(line)


def echo_line(text: str, err: bool = False) -> None:
    """Print one line. Line ends and terminal commands in names and values of other people are escaped."""
    click.echo("".join(char if char.isprintable() else _escaped(char) for char in text), err=err)


def echo_piece(text: str) -> None:
    """Print a piece of a model's answer on stdout. Line ends and tabs stay; terminal commands are escaped."""
    click.echo(TERMINAL_COMMANDS.sub(lambda match: _escaped(match[0]), text), nl=False)


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode()


def echo_json(values: dict) -> None:
    """Print an object as JSON on stdout."""
    click.echo(json_text(values), nl=False)


def echo_note(line: str) -> None:
    """Print a note on stderr."""
    echo_line(f"Note: {line}", err=True)
