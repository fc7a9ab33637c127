"""The command line: parse, call, print. Results go to stdout, progress and errors to stderr.

Exit status: 0 success, 1 a known error or a failed check, 2 wrong usage, 130 interrupted. Modules that cost time are
imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

from loopexport._version import __version__
from loopexport.errors import LoopExportError
from loopexport.files.json_text import json_text

NOTHING_WRITTEN = "Dry run: nothing was written."
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


class Group(click.Group):
    """The one place where a known error becomes a line on stderr and exit status 1."""

    def invoke(self, ctx: click.Context):
        """Run the command."""
        try:
            return super().invoke(ctx)
        except LoopExportError as error:
            _echo_line(f"Error: {error}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("Interrupted; nothing half-made was left behind.", err=True)
            ctx.exit(130)


@click.group(cls=Group, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="loopexport")
def main() -> None:
    """Turn a frozen causal language model into a looped one, without training.

    A span of middle layers is applied several times in small damped steps (arXiv 2605.23872). Gains are not
    guaranteed: compare with the base on your own task.
    """


def spec_options(command):
    """The options that make up a loop spec, named as the fields of `LoopSpec`."""
    options = [
        click.option(
            "--span",
            multiple=True,
            metavar="START:STOP",
            help="Layers to loop, half-open, counted from 0: 12:20 is 12 to 19; repeat it for several spans. "
            "auto is a heuristic: 4 layers at the depth that the authors found best. Required, unless --preset or "
            "--spec has it.",
        ),
        click.option(
            "--steps",
            type=int,
            help="K, how many steps the loop takes, each one run of the span for most rules; 1 is the base model. "
            "Required, unless --preset or --spec has it.",
        ),
        click.option(
            "--damping",
            type=float,
            help="Step size s in (0, 1]; 1 is naive looping.  [default: 1/steps for euler]",
        ),
        click.option("--anchor", type=float, help="Weight of the base's own output in [0, 1].  [default: 0]"),
        click.option("--mode", help="block: the span as one; layer: each of its layers in turn.  [default: block]"),
        click.option("--kv", help="Keys and values of iterations: shared, per_step or reference.  [default: shared]"),
        click.option("--decode", help="Decode steps that loop: full, bypass or first_n.  [default: full]"),
        click.option(
            "--first-n", type=int, help="How many decode steps loop; goes with --decode first_n, which needs it."
        ),
        click.option("--rule", help="Update rule, see `loopexport rules`.  [default: euler]"),
        click.option("--schedule", metavar="NUMBERS", help="Numbers for rules ema_sched and poly_blend: 0.5,0.3,0.2."),
        click.option("--momentum", type=float, help="For rule heavy_ball, in [0, 1).  [default: 0.3]"),
        click.option("--history", type=int, help="Differences that rule anderson fits.  [default: 2]"),
        click.option(
            "--frozen-routing/--no-frozen-routing",
            default=None,
            help="Iterations use the natural pass's experts; for bases that have some.",
        ),
        click.option(
            "--norm-interpolation/--no-norm-interpolation", default=None, help="Iterates keep norms from |x| to |n|."
        ),
        click.option(
            "--preset", metavar="NAME", help="A published cell, see `loopexport presets list`; options override it."
        ),
        click.option(
            "--spec",
            "spec_file",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="YAML file with these options by the same names; options given here override it.",
        ),
    ]
    return functools.reduce(lambda decorated, option: option(decorated), reversed(options), command)


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
weights_option = click.option(
    "--weights",
    type=click.Choice(["auto", "reflink", "hardlink", "copy"]),
    default="auto",
    show_default=True,
    help="How to put the weights in place; auto is reflink where the file system can, else copy.",
)


@main.command(context_settings=CONTEXT)
@click.argument("model")
@click.argument("out", required=False)
@spec_options
@click.option("--revision", help="Branch, tag or commit of a Hub model.")
@click.option(
    "--weights",
    type=click.Choice(["auto", "reflink", "hardlink", "copy", "none"]),
    default="auto",
    show_default=True,
    help="How to put the weights in place; auto is reflink where the file system can, else copy; none leaves those of "
    "a Hub model where they are, for `push` to complete.",
)
@click.option("--overwrite", is_flag=True, help="Replace an export that stands at OUT.")
@click.option("--push", "repo_id", metavar="REPO_ID", help="Publish OUT on the Hub then, as `loopexport push` does.")
@click.option("--private", is_flag=True, help="With --push: make the repository private, if it is new.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@json_option
def convert(model, out, revision, weights, overwrite, repo_id, private, dry_run, as_json, spec_file, **spec) -> None:
    """Write MODEL (a directory or a Hub id) as a looped model directory OUT.

    Without OUT it is called after the model, the span and K, such as Qwen3-4B-looped-15-19-k3.

    The weights are the base's, byte for byte, stored once. OUT loads with
    AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True), without LoopExport.
    """
    from loopexport.export.conversion import apply, plan_convert
    from loopexport.hub.publication import find_target

    from .text import plan_lines, push_lines

    if repo_id is not None:
        find_target(repo_id, private=private)  # a refusal should come before hours of work
    elif private:
        raise click.UsageError("--private goes with --push")
    plan = plan_convert(
        model,
        out,
        revision=revision,
        weights=weights,
        overwrite=overwrite,
        dry_run=dry_run,
        **_merge_spec(spec_file, spec),
    )
    if not as_json:
        _echo_lines(plan_lines(plan))
    if not dry_run:
        with _progress("copying weights", plan.max_disk_bytes) as advance:
            apply(plan, advance)
    if not as_json:
        _echo_line(NOTHING_WRITTEN if dry_run else f"Wrote {plan.out}")
    values = {**plan.to_dict(), "written": not dry_run}
    if repo_id is not None and not dry_run:
        _note(f"should the push fail, `loopexport push {plan.out} {repo_id}` goes on with it")
        push_plan, result = _push(plan.out, repo_id, private=private)
        values["push"] = result.to_dict()
        if not as_json:
            click.echo("\n".join(push_lines(push_plan, result)))
    if as_json:
        _echo_json(values)


@main.command(context_settings=CONTEXT)
@click.argument("directory")
@json_option
def inspect(directory, as_json) -> None:
    """Show the loop of the export DIRECTORY, what it costs and where it came from."""
    from loopexport.export.directory import open_export
    from loopexport.export.small_files import export_notices

    from .text import export_lines

    export = open_export(directory)
    if as_json:
        _echo_json(
            {
                "manifest": json.loads(export.manifest.to_json()),
                "spec": export.spec.to_config_fields(),
                "edited": export.edited,
                "cost": export.cost.to_dict(),
                "notices": export_notices(export),
            }
        )
    else:
        _echo_lines(export_lines(export))


@main.command(context_settings=CONTEXT)
@click.argument("directory")
@click.option(
    "--full",
    is_flag=True,
    help="Hash all weights of known digest, as copied ones are, instead of comparing sizes and headers.",
)
@click.option("--files-only", is_flag=True, help="Do not load the model.")
@click.option("--trust-remote-code", is_flag=True, help="Load modeling code that is not this LoopExport's own.")
@click.option(
    "--runtime",
    type=click.Choice(["transformers", "vllm"]),
    default="transformers",
    show_default=True,
    help="vllm asks an installed vLLM for greedy tokens and compares them with those of transformers.",
)
@json_option
def verify(directory, full, as_json, **options) -> None:
    """Check the export DIRECTORY: its files, the identities and the decoding that its loop promises, its ONNX graphs.

    The model is loaded in fp32 on the CPU, a quantised one in its own dtype where fp32 does not run. Exit status 1 when
    a check fails.
    """
    from loopexport.checks.verification import verify as run_verify
    from loopexport.export.directory import open_export

    from .text import check_lines

    if options["files_only"] and options["runtime"] == "vllm":
        raise click.UsageError(
            "--files-only loads no model, and --runtime vllm compares what models answer; leave one out"
        )
    total = sum(record.size for record in open_export(directory).manifest.weights.values()) if full else 0
    with _progress("hashing weights", total) as advance:
        checks = run_verify(directory, full=full, progress=advance, **options)
    passed = all(check.passed is not False for check in checks)
    if as_json:
        _echo_json({"passed": passed, "checks": [check.to_dict() for check in checks]})
    else:
        _echo_lines(check_lines(checks))
    sys.exit(0 if passed else 1)


@main.command(context_settings=CONTEXT)
@click.argument("directory")
@click.option("--out", help="A copy of the export for the graphs; without it they go into DIRECTORY.")
@click.option("--steps", metavar="K,...", help="One graph for each K: 2,4,8.  [default: the export's own]")
@click.option(
    "--dtype",
    type=click.Choice(["as-is", "fp16", "bf16", "fp32"]),
    default="as-is",
    show_default=True,
    help="What the graphs compute in; as-is writes no weights.",
)
@click.option(
    "--attention",
    type=click.Choice(["portable", "gqa"]),
    default="portable",
    show_default=True,
    help="gqa is faster, and takes no padded batches.",
)
@click.option("--overwrite", is_flag=True, help="Replace an export that stands at OUT.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--no-verify", is_flag=True, help="Do not compare with torch, which loads the model in fp32.")
@json_option
def onnx(directory, out, steps, dtype, attention, overwrite, dry_run, no_verify, as_json) -> None:
    """Write the export DIRECTORY as an ONNX graph, the loop unrolled, on the weights that are there.

    Each graph is compared with torch before it is kept. Exit status 1 when they differ.
    """
    from loopexport.onnx import apply, plan_onnx

    from .text import onnx_outcome_lines, onnx_plan_lines

    plan = plan_onnx(
        directory, out=out, steps=_parse_steps(steps), dtype=dtype, attention=attention, overwrite=overwrite
    )
    if not as_json:
        click.echo("\n".join(onnx_plan_lines(plan)))
    if dry_run:
        _echo_json({**plan.to_dict(), "written": False}) if as_json else click.echo(NOTHING_WRITTEN)
        return
    outcome = apply(plan, verify=not no_verify, say=functools.partial(click.echo, err=True))
    if as_json:
        checks = {name: [check.to_dict() for check in each] for name, each in outcome.checks.items()}
        _echo_json({**plan.to_dict(), "checks": checks, "written": outcome.written})
    else:
        click.echo("\n".join(onnx_outcome_lines(plan, outcome)))
    sys.exit(0 if outcome.written else 1)


@main.command(context_settings=CONTEXT)
@click.argument("directory")
@click.argument("prompt")
@click.option("--file", help="The graph.  [default: model.onnx]")
@click.option("--provider", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, default=0, show_default=True, help="0 is all tokens.")
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--seed", type=int, help="Of the random numbers.")
@click.option("--chat/--no-chat", default=None, help="Use the chat template.  [default: where there is one]")
def run(directory, prompt, file, provider, max_new_tokens, chat, **sampling) -> None:
    """Answer PROMPT with the ONNX graph in DIRECTORY, by ONNX Runtime."""
    from loopexport.onnx.plan import check_installed
    from loopexport.onnx.runtime.model import OnnxModel
    from loopexport.onnx.runtime.sampling import Sampling

    check_installed()
    choice = Sampling(**sampling)
    if choice.temperature == 0 and (choice.top_k or choice.top_p < 1):
        _note("--top-k and --top-p choose among tokens that --temperature draws; without it the answer is greedy")
    model = OnnxModel(directory, file, provider=provider)
    for piece in model.stream_text(prompt, chat=chat, max_new_tokens=max_new_tokens, sampling=choice):
        click.echo(piece, nl=False)
    click.echo()


@main.command(context_settings=CONTEXT)
@click.argument("directory")
@click.argument("out")
@weights_option
def restore(directory, out, weights) -> None:
    """Write the base of the export DIRECTORY to OUT, bit for bit: weights of known digest are hashed first."""
    from loopexport.export.restoration import restore as run_restore

    with _progress("restoring weights", 0) as advance:
        base = run_restore(directory, out, weights=weights, progress=advance)
    _echo_line(f"Wrote {base.root}, the base {base.origin.name}")


@main.command(context_settings=CONTEXT)
@click.argument("directory")
@click.argument("repo_id")
@click.option("--revision", help="Branch to push to; made if it does not exist.  [default: main]")
@click.option("--private", is_flag=True, help="Make the repository private, if it is new.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of changing the branch.")
@click.option("--commit-message", help="Message of the commit.")
@click.option("--token", help="Hub token.  [default: HF_TOKEN, or the saved login]")
@click.option("--no-server-copy", is_flag=True, help="Upload all weights, even those that the Hub could copy.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print how each file would travel, and send nothing; asks the Hub, and needs a token.",
)
@json_option
def push(directory, repo_id, dry_run, as_json, no_server_copy, **options) -> None:
    """Publish the export DIRECTORY as the model REPO_ID on the Hub, in one commit.

    Weights that the base's repository holds are copied there by the Hub; nothing is sent that it has already. Run the
    same command again after a failure.
    """
    from .text import push_lines

    plan, result = _push(directory, repo_id, dry_run=dry_run, server_copy=not no_server_copy, **options)
    if as_json:
        _echo_json(result.to_dict())
    else:
        click.echo("\n".join(push_lines(plan, result)))


@main.command(context_settings=CONTEXT)
@json_option
def rules(as_json) -> None:
    """List the update rules: what each computes, what it takes and how often it runs the span."""
    from loopexport.loop.spec import RULES

    from .text import rule_lines

    if as_json:
        _echo_json({name: asdict(rule) for name, rule in RULES.items()})
    else:
        click.echo("\n".join(rule_lines()))


@main.command(context_settings=CONTEXT)
@json_option
def families(as_json) -> None:
    """List the model families of transformers: what came of converting a tiny model, and of its ONNX export."""
    from loopexport.base.families import outcomes

    from .text import family_lines

    if as_json:
        _echo_json(outcomes())
    else:
        click.echo("\n".join(family_lines()))


@main.group(context_settings=CONTEXT)
def presets() -> None:
    """Published loops, with what was measured: gains and losses."""


@presets.command("list", context_settings=CONTEXT)
@json_option
def list_presets(as_json) -> None:
    """List the published loops, a line each."""
    from loopexport.loop.presets import PRESETS

    from .text import preset_list_lines

    if as_json:
        _echo_json({preset.name: preset.to_dict() for preset in PRESETS})
    else:
        click.echo("\n".join(preset_list_lines()))


@presets.command("show", context_settings=CONTEXT)
@click.argument("name")
@json_option
def show_preset(name, as_json) -> None:
    """Show the published loop NAME: the model it is for, its fields and its results."""
    from loopexport.loop.presets import find_preset

    from .text import preset_lines

    preset = find_preset(name)
    if as_json:
        _echo_json(preset.to_dict())
    else:
        click.echo("\n".join(preset_lines(preset)))


def _push(directory, repo_id, *, dry_run: bool = False, **options):
    """Push an export: the plan, and what came of it."""
    from loopexport.export.directory import open_export
    from loopexport.hub.publication import apply, plan_push, planned

    manifest = open_export(directory).manifest
    sizes = [record.size for record in manifest.weights.values()] + [record.size for record in manifest.onnx.values()]
    with _progress("hashing weights", sum(sizes)) as advance:
        plan = plan_push(directory, repo_id, progress=advance, **options)
    for notice in plan.notices:
        _note(notice)
    return plan, planned(plan) if dry_run else apply(plan, _note)


def _note(line: str) -> None:
    _echo_line(f"Note: {line}", err=True)


def _merge_spec(spec_file: Path | None, options: dict) -> dict:
    from loopexport.loop.spec import read_spec_file

    given = {name: value for name, value in options.items() if value is not None and value != ()}
    return {**read_spec_file(spec_file), **given} if spec_file else given


def _parse_steps(text: str | None) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(int(each) for each in text.split(","))
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is not a list of whole numbers such as 2,4,8", param_hint="--steps"
        ) from None


def _progress(label: str, total_bytes: int):
    """A progress bar on stderr that shows once bytes really move; as a context, the function that advances it."""
    from .progress import byte_progress

    return byte_progress(label, total_bytes)


def _echo_lines(lines: list[str]) -> None:
    for line in lines:
        _echo_line(line)


def _echo_line(text: str, err: bool = False) -> None:
    """One line, whatever is in the text: strangers' names and values may hold line ends and terminal commands."""
    printable = (char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    click.echo("".join(printable), err=err)


def _echo_json(values: dict) -> None:
    click.echo(json_text(values), nl=False)
