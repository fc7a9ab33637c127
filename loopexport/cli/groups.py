"""Click classes: commands in the order of work, errors on one line, and options under headings."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from contextlib import suppress

import click

from loopexport.errors import LoopExportError, nearest

from .output import echo_line

LOOP, TASKS, ENGINE = "The loop", "The tasks", "The model in memory"
FILES, HUB, OUTPUT = "The files", "The Hub", "Output"


class Group(click.Group):
    """The main group. Here, and nowhere else, a known error becomes one line on stderr and exit status 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order in which they were added."""
        return list(self.commands)

    def main(self, *args, **settings):
        """Run the command line. Output that cannot be written, as on a full disk, is an error on one line.

        Click itself ends quietly when the reader of a pipe has gone, as `head` does.
        """
        try:
            return super().main(*args, **settings)
        except OSError as error:
            if not _is_of_echo(error):
                raise
            with suppress(OSError):
                echo_line(f"Error: cannot write to stdout: {error.strerror or error}", err=True)
            _discard_unwritten()
            sys.exit(1)

    def invoke(self, ctx: click.Context):
        """Run the command."""
        try:
            return super().invoke(ctx)
        except LoopExportError as error:
            echo_line(f"Error: {error}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("Interrupted; no partial output was left behind.", err=True)
            ctx.exit(130)


def _is_of_echo(error: OSError) -> bool:
    """Whether an error came from printing: every command, `--help` and `--version` print by `click.echo` alone."""
    return any(frame.f_code is click.echo.__code__ for frame, _ in traceback.walk_tb(error.__traceback__))


def _discard_unwritten() -> None:
    """Send what the streams still hold nowhere: Python would flush them at exit, and report the failure again."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Words(click.Choice):
    """One of a few words; the error for another word names the nearest."""

    def convert(self, value, param: click.Parameter | None, ctx: click.Context | None):
        """Check the word."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            near = nearest(value, tuple(self.choices))
            if near is None:
                raise
            self.fail(f"{error.message} Did you mean {near!r}?", param, ctx)


class GroupedOption(click.Option):
    """An option that `--help` shows under the heading `group`."""

    def __init__(self, *names, group: str, **settings):
        super().__init__(*names, **settings)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose `--help` shows options under headings; options without a heading are at the end."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options to `formatter`, one section for each heading."""
        sections: dict[str, list[tuple[str, str]]] = {
            heading: [] for heading in (LOOP, TASKS, ENGINE, FILES, HUB, OUTPUT)
        }
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                sections[getattr(parameter, "group", OUTPUT)].append(record)
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


def option(group: str, *names: str, **settings):
    """`click.option` under a heading."""
    return click.option(*names, cls=GroupedOption, group=group, **settings)


def combine(*decorators):
    """One decorator for several options, in this order."""
    return lambda command: functools.reduce(lambda inner, outer: outer(inner), reversed(decorators), command)
