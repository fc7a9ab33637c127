"""`loopexport onnx`."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from typing import get_args

import click

from loopexport.choices import Attention, Compute, OnnxDtype
from loopexport.cli.groups import Words
from loopexport.cli.options import complete_directory, directory_argument, dry_run_option, json_option, overwrite_option
from loopexport.cli.output import NOTHING_WRITTEN, echo_json, echo_line, echo_lines
from loopexport.cli.progress import ByteBar


@click.command(short_help="Unroll an export into an ONNX graph.")
@directory_argument
@click.option(
    "--out",
    metavar="OUT",
    shell_complete=complete_directory,
    help="Write a copy of the export with the graphs.  [default: write the graphs into DIRECTORY]",
)
@click.option("--steps", metavar="K,...", help="One graph for each K, such as 2,4,8.  [default: the export's own K]")
@click.option(
    "--dtype",
    type=Words(get_args(OnnxDtype)),
    default="as-is",
    show_default=True,
    help="Number format of the weights; as-is keeps the stored one and writes no weights. int8 costs almost nothing, "
    "int4 more; the command measures and says how much.",
)
@click.option(
    "--compute",
    type=Words(get_args(Compute)),
    help="With int4, int8: fp32 for CPUs, fp16 or bf16 for GPUs.  [default: fp32]",
)
@click.option(
    "--block-size", type=int, default=32, show_default=True, help="With int4, int8: inputs that share a scale."
)
@click.option("--symmetric", is_flag=True, help="With int4, int8: no zero points.")
@click.option("--quantise-head", is_flag=True, help="With int4, int8: the head, and a tied embedding, in 8 bits.")
@click.option("--mixed", is_flag=True, help="With int4: the layers that lose most in 8 bits.")
@click.option("--text", metavar="FILE", help="With int4, int8: measure what quantising costs on this text.")
@click.option(
    "--attention",
    type=Words(get_args(Attention)),
    default="portable",
    show_default=True,
    help="gqa is faster and smaller; other runners than ours give it no padded batches.",
)
@overwrite_option
@dry_run_option
@click.option(
    "--no-verify",
    is_flag=True,
    help="Do not compare with torch, which loads the model in fp32; do not measure what quantising costs.",
)
@json_option
def onnx(directory, steps, dry_run, no_verify, as_json, **options) -> None:
    """Unroll the loop of the export DIRECTORY into an ONNX graph that reads the export's own weights.

    Each graph is compared with torch before it is kept. Exit status 1 if they differ.
    """
    from loopexport.cli.text import onnx_outcome_lines, onnx_plan_lines
    from loopexport.export.replaced import check_replaceable, replacement_warnings
    from loopexport.onnx import plan_onnx

    if no_verify and options["text"] is not None:
        raise click.UsageError("--no-verify skips the measurement that --text is for; give one of them")
    plan = plan_onnx(directory, steps=_parse_steps(steps), **options)
    if plan.overwrite and plan.out is not None:
        check_replaceable(plan.out, plan.export.manifest.weights)
        warnings = replacement_warnings(plan.out, mlx=plan.export.runs_on_mlx)
        plan = replace(plan, warnings=(*plan.warnings, *warnings))
    if not as_json:
        echo_lines(onnx_plan_lines(plan))
    if dry_run:
        echo_json({**plan.to_dict(), "written": False}) if as_json else echo_line(NOTHING_WRITTEN)
        return
    outcome = _apply(plan, verify=not no_verify)
    if as_json:
        checks = {name: [check.to_dict() for check in each] for name, each in outcome.checks.items()}
        costs = {name: asdict(cost) for name, cost in outcome.costs.items()}
        measured = {"costs": costs, "not_measured": outcome.not_measured} if plan.quantisation else {}
        echo_json({**plan.to_dict(), "checks": checks, **measured, "written": outcome.written})
    else:
        echo_lines(onnx_outcome_lines(plan, outcome))
    sys.exit(0 if outcome.written else 1)


def _apply(plan, verify: bool):
    with ByteBar("writing weights", plan.data_bytes) as bar:

        def say(line: str) -> None:
            bar.close()
            echo_line(line, err=True)

        return plan.apply(verify=verify, say=say, progress=bar)


def _parse_steps(text: str | None) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(int(each) for each in text.split(","))
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is not a list of whole numbers such as 2,4,8", param_hint="--steps"
        ) from None
