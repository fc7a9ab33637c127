"""`loopexport convert`."""

from __future__ import annotations

import click

from loopexport.cli import options
from loopexport.cli.groups import HUB, GroupedCommand, option
from loopexport.cli.output import NOTHING_WRITTEN, echo_json, echo_line, echo_lines, echo_note
from loopexport.cli.progress import ByteBar

from .push import push_export


@click.command(cls=GroupedCommand, short_help="Write a model as a looped model directory.")
@click.argument("model", shell_complete=options.complete_directory)
@click.argument("out", required=False, shell_complete=options.complete_directory)
@options.loop_options
@options.convert_weights_option
@options.adapter_option
@options.text_only_option
@options.mlx_option
@options.overwrite_option
@options.base_revision_option
@options.push_option
@option(HUB, "--private", is_flag=True, help="With --push: make a new repository private.")
@options.dry_run_option
@options.json_option
def convert(model, out, repo_id, private, dry_run, as_json, spec_file, **given) -> None:
    """Write MODEL (a directory or a Hub id) as a looped model directory.

    OUT defaults to MODEL-looped-START-STOP-kK, with --text-only to MODEL-text-looped-...

    The weights stay the base's, byte for byte, and are stored once. The export loads without LoopExport:
    AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True).

    A multimodal MODEL loops in its language model alone. Its export loads with AutoModelForImageTextToText.
    """
    from loopexport.cli.text import plan_lines, push_lines
    from loopexport.export.conversion import plan_convert

    _check_push(repo_id, private)
    plan = plan_convert(model, out, dry_run=dry_run, **options.merge_spec(spec_file, given))
    values = {**plan.to_dict(), "written": not dry_run}
    if not as_json:
        echo_lines(plan_lines(plan))
    if not dry_run:
        with ByteBar("copying weights", plan.max_disk_bytes) as advance:
            plan.apply(advance)
    if not as_json:
        echo_line(NOTHING_WRITTEN if dry_run else f"Wrote {plan.out}")
    if repo_id is not None and not dry_run:
        echo_note(f"if the push fails, run `loopexport push {plan.out} {repo_id}` to continue")
        push_plan, result = push_export(plan.out, repo_id, private=private)
        values["push"] = result.to_dict()
        if not as_json:
            echo_lines(push_lines(push_plan, result))
    if as_json:
        echo_json(values)


def _check_push(repo_id: str | None, private: bool) -> None:
    """Check the repository first: the Hub should refuse before hours of work, not after."""
    from loopexport.hub.publication import find_target

    if repo_id is not None:
        find_target(repo_id, private=private)
    elif private:
        raise click.UsageError("--private needs --push")
