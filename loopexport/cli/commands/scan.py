"""`loopexport scan`."""

from __future__ import annotations

import click

from loopexport.cli import evaluation_options, options, scan_options
from loopexport.cli.groups import GroupedCommand
from loopexport.cli.output import echo_json, echo_line, echo_lines
from loopexport.cli.progress import AnswerBar, silence_other_bars


@click.command(cls=GroupedCommand, short_help="Try many loops of a base, and test the best.")
@click.argument("model", shell_complete=options.complete_directory)
@scan_options.grid_options
@evaluation_options.task_options
@evaluation_options.engine_options
@options.adapter_option
@options.base_revision_option
@evaluation_options.results_option
@options.dry_run_option
@options.json_option
def scan(model, dry_run, as_json, **given) -> None:
    """Try every loop of a grid on MODEL, a base, and test the best on items of their own.

    The items are split once, by a hash of each. All loops are ranked on the selection part; the best few answer the
    test part. A loop is recommended only if it is better there, with p adjusted by Holm for the number of loops tested.
    If none is, no loop is recommended, and the exit status is 0 all the same. Several tasks count as one pool of items.
    """
    silence_other_bars()
    from loopexport.cli.scan_text import scan_lines, scan_plan_lines
    from loopexport.evaluation.scanning import plan_scan

    plan = plan_scan(model, dry_run=dry_run, **given)
    if not as_json:
        echo_lines(scan_plan_lines(plan))
    if dry_run:
        if as_json:
            echo_json(plan.to_dict())
        return
    with AnswerBar("answers") as progress:
        result = plan.run(progress)
    if as_json:
        echo_json(result.to_dict())
        return
    echo_lines(scan_lines(result))
    if plan.out is not None:
        echo_line(f"Wrote cells.csv, scan.json and heatmaps to {plan.out}")
