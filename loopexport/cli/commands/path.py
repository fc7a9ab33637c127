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

    given = {name: value for name, value in loop.items() if value not in (None, ())}
    is_base = not is_export(Path(model).expanduser())
    fields = options.merge_spec(given.pop("spec_file", None), given) if is_base else given
    preset = fields.pop("preset", None)
    found = find_loop(
        model, fields, preset=preset, revision=revision, without_adapter=without_adapter, text_only=text_only
    )
    if as_json:
        echo_json({**path_values(found.base, found.spec), "warnings": list(found.warnings)})
        return
    lines = path_lines(found.base, found.spec, is_path_given="path" in fields)
    echo_lines([*lines, *(f"Note     {warning}" for warning in found.warnings)])
