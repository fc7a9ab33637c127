"""`loopexport path`."""

from __future__ import annotations

from pathlib import Path

import click

from loopexport.cli import options
from loopexport.cli.groups import GroupedCommand
from loopexport.cli.output import echo_json, echo_lines


@click.command(cls=GroupedCommand, short_help="Draw a loop as the sequence of layers that run.")
@click.argument("model", metavar="MODEL_OR_EXPORT", shell_complete=options.complete_directory)
@options.loop_options
@options.adapter_option
@options.text_only_option
@options.base_revision_option
@options.json_option
def path(model, as_json, revision, without_adapter, text_only, **loop) -> None:
    """Draw a loop as the sequence of layers that a token runs through, and count them.

    MODEL_OR_EXPORT is an export, or a base with the options of a loop. Nothing is written, and no weights are read.
    """
    from loopexport.cli.path_text import path_lines, path_values
    from loopexport.export.base_loop import find_loop
    from loopexport.export.directory import is_export

    is_given = any(value not in (None, ()) for value in loop.values())
    has_own = is_export(Path(model).expanduser()) and not is_given
    fields = {} if has_own else options.merge_spec(loop.pop("spec_file"), loop)
    preset = fields.pop("preset", None)
    found = find_loop(
        model, fields, preset=preset, revision=revision, without_adapter=without_adapter, text_only=text_only
    )
    if as_json:
        echo_json({**path_values(found.base, found.spec), "warnings": list(found.warnings)})
        return
    echo_lines([*path_lines(found.base, found.spec), *(f"Note     {warning}" for warning in found.warnings)])
