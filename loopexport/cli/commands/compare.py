"""`loopexport compare`."""

from __future__ import annotations

from pathlib import Path

import click

from loopexport.cli import evaluation_options, options
from loopexport.cli.groups import GroupedCommand
from loopexport.cli.output import echo_json, echo_line, echo_lines, echo_note
from loopexport.cli.progress import AnswerBar, silence_other_bars


@click.command(cls=GroupedCommand, short_help="Measure on tasks whether a loop is better than its base.")
@click.argument("model", metavar="MODEL_OR_EXPORT", shell_complete=options.complete_directory)
@options.loop_options
@evaluation_options.task_options
@evaluation_options.backend_option
@evaluation_options.engine_options
@evaluation_options.trust_option
@options.adapter_option
@options.base_revision_option
@evaluation_options.results_option
@evaluation_options.save_option
@options.dry_run_option
@options.json_option
def compare(model, spec_file, save, dry_run, as_json, **given) -> None:
    """Let a loop and its base answer the same items, and say whether the loop is better, worse, or nobody can know.

    MODEL_OR_EXPORT is an export, or a base with the options of a loop; nothing has to be converted first. The tasks are
    those of lm-evaluation-harness (pip install 'loopexport[eval]'), or a file of your own items. The exit status is 0
    whatever the verdict.
    """
    silence_other_bars()
    from loopexport.cli.comparison_text import comparison_lines
    from loopexport.cli.evaluation_text import compare_plan_lines, time_line
    from loopexport.evaluation.comparison import plan_compare
    from loopexport.evaluation.settings import process_rank
    from loopexport.export.base_loop import check_export_options
    from loopexport.export.directory import is_export

    has_own_loop = is_export(Path(model).expanduser())
    loop, asked = evaluation_options.split_loop(spec_file, given, is_export=has_own_loop)
    if has_own_loop:  # before the tasks, whose errors would lead to this one
        of_base = ("preset", "revision", "without_adapter")
        check_export_options(model, loop, **{name: asked[name] for name in of_base})
    plan = plan_compare(model, loop or None, dry_run=dry_run, **asked)
    export = plan.subject.export
    if save and export is None:
        raise click.UsageError("--save writes into an export, and MODEL_OR_EXPORT is a base; convert it first")
    if not as_json and process_rank() == 0:
        echo_lines(compare_plan_lines(plan))
    if dry_run:
        if as_json:
            echo_json(plan.to_dict())
        return
    with AnswerBar("answers") as progress:
        result = plan.run(progress)
    if result is None:  # not the first process
        return
    if plan.out is not None:
        result.write_report(plan.out)
    if save and export is not None and not result.save(export):
        echo_note("README.md was edited, so it stays as it is and does not show the result")
    if as_json:
        echo_json(result.to_dict())
        return
    echo_lines([*comparison_lines(result.comparisons, result.floor), time_line(result.seconds)])
    if plan.out is not None:
        echo_line(f"Wrote {plan.out}/report.html")
