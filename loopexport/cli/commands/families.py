"""`loopexport families`."""

from __future__ import annotations

import click

from loopexport.cli.options import json_option
from loopexport.cli.output import echo_json, echo_lines


@click.command(short_help="List the model families, and which can be looped.")
@json_option
def families(as_json) -> None:
    """List the model families of transformers, and the result of converting a tiny model of each."""
    from loopexport.base.families import worded_outcomes
    from loopexport.cli.text import family_lines

    if as_json:
        echo_json(worded_outcomes())
    else:
        echo_lines(family_lines())
