"""`loopexport inspect`."""

from __future__ import annotations

import json

import click

from loopexport.cli.options import directory_argument, json_option
from loopexport.cli.output import echo_json, echo_lines


@click.command(short_help="Show an export's loop, cost, origin and results.")
@directory_argument
@json_option
def inspect(directory, as_json) -> None:
    """Show the loop of the export DIRECTORY, its cost, its origin and its measured results."""
    from loopexport.cli.text import export_lines, result_lines
    from loopexport.export.directory import open_export
    from loopexport.export.results_file import measured

    export = open_export(directory)
    results = measured(export)
    if as_json:
        echo_json(_values(export) | {"results": results.to_dict()})
    else:
        echo_lines([*export_lines(export), *result_lines(results)])


def _values(export) -> dict:
    from loopexport.export.small_files import export_warnings

    return {
        "manifest": json.loads(export.manifest.to_json()),
        "spec": export.spec.to_config_fields(),
        "multimodal": export.base.is_multimodal,
        "text_only": export.manifest.text_only,
        "edited": export.edited,
        "mlx": export.runs_on_mlx,
        "cost": export.cost.to_dict(),
        "notices": export_warnings(export),
    }
