"""`loopexport mlx`."""

from __future__ import annotations

import click

from loopexport.cli.options import directory_argument, dry_run_option, json_option
from loopexport.cli.output import NOTHING_WRITTEN, echo_json, echo_line, echo_lines


@click.command(short_help="Let mlx-lm load an export.")
@directory_argument
@dry_run_option
@json_option
def mlx(directory, dry_run, as_json) -> None:
    """Let mlx-lm load the export DIRECTORY, with --trust-remote-code.

    Adds one field to its config. The weights stay as they are, and every other runtime loads it as before.
    """
    from loopexport.cli.text import mlx_lines, mlx_plan_lines
    from loopexport.export.mlx_plan import plan_mlx

    plan = plan_mlx(directory)
    if not as_json:
        echo_lines(mlx_plan_lines(plan))
    is_card_new = True if dry_run else plan.apply()
    if as_json:
        echo_json({**plan.to_dict(), "written": not (dry_run or plan.is_current)})
    elif dry_run:
        echo_line(NOTHING_WRITTEN)
    else:
        echo_lines(mlx_lines(plan, is_card_new))
