"""`loopexport verify`."""

from __future__ import annotations

import sys
from typing import get_args

import click

from loopexport.choices import Runtime
from loopexport.cli.groups import Words
from loopexport.cli.options import directory_argument, json_option
from loopexport.cli.output import echo_json, echo_lines
from loopexport.cli.progress import ByteBar


@click.command(short_help="Check an export: files, K=1, cached decoding, ONNX graphs.")
@directory_argument
@click.argument("vllm_flags", metavar="[-- VLLM_FLAGS...]", nargs=-1)
@click.option(
    "--full", is_flag=True, help="Hash the weights that have a recorded digest. Without it, compare sizes and headers."
)
@click.option("--files-only", is_flag=True, help="Check the files without loading the model.")
@click.option(
    "--trust-remote-code", is_flag=True, help="Run modeling code that differs from the installed LoopExport's."
)
@click.option(
    "--runtime",
    type=Words(get_args(Runtime)),
    default="transformers",
    show_default=True,
    help="vllm compares the greedy tokens of the installed vLLM with those of transformers, mlx the logits of the "
    "installed mlx-lm. Flags of vLLM's server go after --: `-- --max-model-len 4096`.",
)
@json_option
def verify(directory, as_json, **options) -> None:
    """Check an export: files, K=1 equals the base, the loop by hand, cached decoding, ONNX graphs.

    A file beside the export's own fails if transformers or another runtime would load it. The loop is computed a second
    time by hand, over the native model and without the export's code. The model is loaded in fp32 on the CPU; a
    quantised model that does not run in fp32 keeps its own dtype. Exit status 1 if a check fails.
    """
    from loopexport.checks.verification import verify as run_checks
    from loopexport.cli.text import check_lines

    if options["files_only"] and options["runtime"] != "transformers":
        raise click.UsageError(
            f"--files-only does not load the model, but --runtime {options['runtime']} needs it; leave one out"
        )
    if options["vllm_flags"] and options["runtime"] != "vllm":
        raise click.UsageError(f"{' '.join(options['vllm_flags'])} is for vLLM; add --runtime vllm, or leave it out")
    with ByteBar("hashing weights", _bytes_to_hash(directory, options["full"])) as advance:
        checks = run_checks(directory, progress=advance, **options)
    passed = all(check.passed is not False for check in checks)
    if as_json:
        echo_json({"passed": passed, "checks": [check.to_dict() for check in checks]})
    else:
        echo_lines(check_lines(checks))
    sys.exit(0 if passed else 1)


def _bytes_to_hash(directory, full: bool) -> int:
    from loopexport.export.directory import open_export

    return sum(record.size for record in open_export(directory).manifest.weights.values()) if full else 0
