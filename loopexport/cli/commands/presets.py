"""`loopexport presets list` and `loopexport presets show`."""

from __future__ import annotations

import click

from loopexport.cli.options import complete_preset, json_option
from loopexport.cli.output import echo_json, echo_lines


@click.group(short_help="Show published loops, with measured gains and losses.")
def presets() -> None:
    """Show published loops, with measured gains and losses."""


@presets.command("list", short_help="List the published loops, one line each.")
@json_option
def list_presets(as_json) -> None:
    """List the published loops, one line each."""
    from loopexport.cli.text import preset_list_lines
    from loopexport.loop.presets import PRESETS

    if as_json:
        echo_json({preset.name: preset.to_dict() for preset in PRESETS})
    else:
        echo_lines(preset_list_lines())


@presets.command("show", short_help="Show one published loop.")
@click.argument("name", shell_complete=complete_preset)
@json_option
def show_preset(name, as_json) -> None:
    """Show the published loop NAME: its model, its fields and its results."""
    from loopexport.cli.text import preset_lines
    from loopexport.loop.presets import find_preset

    preset = find_preset(name)
    if as_json:
        echo_json(preset.to_dict())
    else:
        echo_lines(preset_lines(preset))
