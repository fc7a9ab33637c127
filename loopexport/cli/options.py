"""Options that a command has, or shares with others."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click
from click.shell_completion import CompletionItem

from loopexport.choices import Placement, Weights
from loopexport.templates.looped_spec import DECODE_MODES, KV_POLICIES, MODES, RULES

from .groups import FILES, HUB, LOOP, OUTPUT, Words, combine, option


def complete_directory(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Let the shell complete a directory."""
    return [CompletionItem(incomplete, type="dir")]


def complete_preset(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the name of a preset."""
    from loopexport.loop.presets import PRESETS

    return [CompletionItem(each.name, help=each.status) for each in PRESETS if each.name.startswith(incomplete)]


loop_options = combine(
    option(
        LOOP,
        "--span",
        multiple=True,
        metavar="START:STOP",
        help="Layers to loop, half-open, counted from 0: 12:20 means layers 12 to 19. Repeat the option for several "
        "spans; 12:20x3 gives one its own K. auto is a heuristic: 4 layers at the depth that worked best for the "
        "authors. Required without another option that says which layers loop.",
    ),
    option(
        LOOP,
        "--steps",
        type=int,
        metavar="K",
        help="Number of steps; 1 is the base model. Most rules run the span once in each step. Required with a span "
        "that has no K of its own.",
    ),
    option(
        LOOP,
        "--path",
        metavar="RUNS",
        help="Instead of --span: the layers that a token visits, in order. 0-14,12-39 (with the last layer) or "
        "0:15,12:40 (without it) runs layers 12 to 14 twice. There is no damping; --kv is per_step by default.",
    ),
    option(
        LOOP,
        "--rys",
        metavar="I,J",
        help="Instead of --span: RYS's pair. Layers I to J-1 run twice: --steps 2 --damping 1 --kv per_step by "
        "default.",
    ),
    option(
        LOOP,
        "--from-mergekit",
        type=click.Path(),
        metavar="FILE",
        help="Instead of --span: a mergekit config with passthrough slices of MODEL alone.",
    ),
    option(
        LOOP,
        "--damping",
        type=float,
        help="Step size s in (0, 1]; 1 is naive looping.  [default: 1/steps for euler; see `loopexport rules`]",
    ),
    option(
        LOOP,
        "--anchor",
        type=float,
        help="Weight of the natural pass in the output, in [0, 1]; 1 is the base model.  [default: 0]",
    ),
    option(
        LOOP,
        "--mode",
        type=Words(MODES),
        help="Loop the span as one block, or each of its layers in turn.  [default: block]",
    ),
    option(
        LOOP,
        "--kv",
        type=Words(KV_POLICIES),
        help="Keys and values that an iteration attends to: from the natural pass (shared), its own (per_step), or a "
        "mix as in the authors' code (reference).  [default: shared]",
    ),
    option(
        LOOP,
        "--decode",
        type=Words(DECODE_MODES),
        help="Decode steps that loop: all, none, or only the first.  [default: full]",
    ),
    option(LOOP, "--first-n", type=int, metavar="N", help="With --decode first_n: how many decode steps loop."),
    option(
        LOOP,
        "--rule",
        type=Words(tuple(RULES)),
        metavar="NAME",
        help="Update rule; see `loopexport rules`.  [default: euler]",
    ),
    option(
        LOOP,
        "--schedule",
        metavar="NUMBERS",
        help="Numbers for rules ema_sched and poly_blend, such as 0.5,0.3,0.2.",
    ),
    option(LOOP, "--momentum", type=float, help="For rule heavy_ball, in [0, 1).  [default: 0.3]"),
    option(LOOP, "--history", type=int, help="For rule anderson: how many past differences to fit.  [default: 2]"),
    option(
        LOOP,
        "--frozen-routing/--no-frozen-routing",
        default=None,
        help="Iterations use the experts that the natural pass chose (sparse MoE).",
    ),
    option(
        LOOP,
        "--norm-interpolation/--no-norm-interpolation",
        default=None,
        help="Rescale each iterate to a norm between |x| and |n|.",
    ),
    option(
        LOOP,
        "--preset",
        metavar="NAME",
        shell_complete=complete_preset,
        help="A published loop; see `loopexport presets list`. Other options override its fields.",
    ),
    option(
        LOOP,
        "--spec",
        "spec_file",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="YAML file with these options by the same names. Options on the command line override it.",
    ),
)


def weights_option(kind, more: str = ""):
    """`--weights`, with the words of the type `kind`."""
    return option(
        FILES,
        "--weights",
        type=Words(get_args(kind)),
        default="auto",
        show_default=True,
        help=f"How to put the weights in place; auto is a reflink where the file system can, else a copy{more}.",
    )


restore_weights_option = weights_option(Placement)
convert_weights_option = weights_option(
    Weights, "; none leaves the weights of a Hub model on the Hub, and `push` copies them there"
)
adapter_option = option(
    FILES, "--without-adapter", is_flag=True, help="Ignore a PEFT adapter beside the weights instead of refusing MODEL."
)
text_only_option = option(
    FILES,
    "--text-only",
    is_flag=True,
    help="Take the language model alone out of a multimodal MODEL; AutoModelForCausalLM loads it. Refused if "
    "transformers has no causal language model of its type (Qwen-VL, GLM-V, Mllama).",
)
mlx_option = option(
    FILES,
    "--mlx",
    is_flag=True,
    help="Let mlx-lm load OUT too, as `loopexport mlx` does; it needs --kv shared or per_step.",
)
overwrite_option = option(FILES, "--overwrite", is_flag=True, help="Replace an existing export at OUT.")

base_revision_option = option(HUB, "--revision", help="Branch, tag or commit of MODEL on the Hub.")
push_option = option(
    HUB, "--push", "repo_id", metavar="REPO_ID", help="Then publish OUT on the Hub, as `loopexport push` does."
)

dry_run_option = option(OUTPUT, "--dry-run", is_flag=True, help="Print the plan and stop.")
json_option = option(OUTPUT, "--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")

directory_argument = click.argument("directory", shell_complete=complete_directory)


def merge_spec(spec_file: Path | None, options: dict) -> dict:
    """The options that were given, and below them the entries of the spec file.

    Raises:
        click.UsageError: neither options nor a preset nor a spec file give the span and the steps.
    """
    from loopexport.loop.recipes import overridden
    from loopexport.loop.spec import missing_field, read_spec_file

    given = {name: value for name, value in options.items() if value is not None and value != ()}
    if spec_file:
        return overridden(read_spec_file(spec_file), given)
    missing = missing_field(given)
    if missing and "preset" not in given:
        raise click.UsageError(missing)
    return given
