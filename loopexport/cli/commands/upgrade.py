"""`loopexport upgrade`."""

from __future__ import annotations

import click

from loopexport.cli.options import directory_argument, dry_run_option, json_option
from loopexport.cli.output import NOTHING_WRITTEN, echo_json, echo_line, echo_lines


@click.command(short_help="Bring the code of an older export up to date.")
@directory_argument
@dry_run_option
@json_option
def upgrade(directory, dry_run, as_json) -> None:
    """Replace the code files of the export DIRECTORY, which an earlier LoopExport wrote, by today's.

    First the model runs with the old and the new code, in fp32 on the CPU. Nothing changes unless the logits are equal
    up to rounding. Weights, config and ONNX graphs stay as they are.
    """
    from loopexport.checks.code_proof import apply_upgrade
    from loopexport.cli.text import upgrade_lines, upgrade_plan_lines
    from loopexport.export.code_upgrade import plan_upgrade

    plan = plan_upgrade(directory)
    if not as_json:
        echo_lines(upgrade_plan_lines(plan))
    if dry_run:
        echo_json({**plan.to_dict(), "written": False}) if as_json else echo_line(NOTHING_WRITTEN)
        return
    result = apply_upgrade(plan)
    if as_json:
        echo_json(result.to_dict())
    else:
        echo_lines(upgrade_lines(result))
