"""`loopexport rules`."""

from __future__ import annotations

from dataclasses import asdict

import click

from loopexport.cli.options import json_option
from loopexport.cli.output import echo_json, echo_lines


@click.command(short_help="List the update rules.")
@json_option
def rules(as_json) -> None:
    """List the update rules: formula, fields, and how often each step runs the span."""
    from loopexport.cli.text import rule_lines
    from loopexport.loop.spec import RULES

    if as_json:
        echo_json({name: asdict(rule) for name, rule in RULES.items()})
    else:
        echo_lines(rule_lines())
