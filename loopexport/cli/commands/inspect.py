"""`loopexport inspect`."""

from __future__ import annotations

import json

import click

from loopexport.cli.options import directory_argument, json_option
from loopexport.cli.output import echo_json, echo_lines


@click.command(short_help="Show an export's loop, its cost and its origin.")
@directory_argument
@json_option
def inspect(directory, as_json) -> None:
    """Show the loop of the export DIRECTORY, its cost and its origin."""
    from loopexport.cli.text import export_lines
    from loopexport.export.directory import open_export

    export = open_export(directory)
    if as_json:
        echo_json(_values(export))
    else:
        echo_lines(export_lines(export))


def _values(export) -> dict:
    from loopexport.export.small_files import export_warnings

    return {
        "manifest": json.loads(export.manifest.to_json()),
        "spec": export.spec.to_config_fields(),
        "edited": export.edited,
        "cost": export.cost.to_dict(),
        "notices": export_warnings(export),
    }
