"""`loopexport adopt`."""

from __future__ import annotations

import click

from loopexport.cli.options import directory_argument, dry_run_option, json_option
from loopexport.cli.output import NOTHING_WRITTEN, echo_json, echo_line, echo_lines
from loopexport.cli.progress import ByteBar


@click.command(short_help="Make an export of a looped model that was trained.")
@directory_argument
@click.option(
    "--base",
    metavar="MODEL",
    help="The model that was trained: a Hub id, a directory, or an export. It gives the name and the licence on the "
    "card, and the tokenizer and the processor if DIRECTORY has none.",
)
@dry_run_option
@json_option
def adopt(directory, base, dry_run, as_json) -> None:
    """Make an export of DIRECTORY, which `save_pretrained` of a looped model wrote after training.

    The weights stay where they are. `verify`, `onnx`, `push` and `restore` then work on it. Merge adapters first.
    """
    from loopexport.cli.text import adopt_plan_lines
    from loopexport.export.adoption import plan_adopt

    plan = plan_adopt(directory, base=base)
    if not as_json:
        echo_lines(adopt_plan_lines(plan))
    if not dry_run:
        with ByteBar("hashing weights", plan.base.weight_bytes) as advance:
            plan.apply(advance)
    if as_json:
        echo_json({**plan.to_dict(), "written": not dry_run})
    else:
        echo_line(NOTHING_WRITTEN if dry_run else f"Adopted {plan.root}")
