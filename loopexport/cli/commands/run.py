"""`loopexport run`."""

from __future__ import annotations

import warnings
from typing import get_args

import click

from loopexport.choices import Provider
from loopexport.cli.groups import Words
from loopexport.cli.options import directory_argument
from loopexport.cli.output import echo_note, echo_piece


@click.command(short_help="Answer a prompt with an ONNX graph.")
@directory_argument
@click.argument("prompt")
@click.option("--file", help="File name of the graph.  [default: model.onnx]")
@click.option(
    "--provider",
    type=Words(get_args(Provider)),
    default="auto",
    show_default=True,
    help="Where ONNX Runtime computes; auto is CUDA if it works.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Length of the answer, at most.",
)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="Sampling temperature; 0 is greedy.")
@click.option("--top-k", type=int, default=0, show_default=True, help="Keep the k likeliest tokens; 0 keeps all.")
@click.option(
    "--top-p",
    type=float,
    default=1.0,
    show_default=True,
    help="Keep the likeliest tokens, until they reach this total probability.",
)
@click.option("--seed", type=int, help="Random seed.")
@click.option(
    "--prefill-chunk",
    type=click.IntRange(min=2),
    help="Tokens of the prompt to run at once; a smaller number takes less memory.  [default: automatic]",
)
@click.option("--chat/--no-chat", default=None, help="Use the chat template.  [default: if there is one]")
def run(directory, prompt, file, provider, max_new_tokens, prefill_chunk, chat, **sampling) -> None:
    """Answer PROMPT with the ONNX graph in DIRECTORY, in ONNX Runtime."""
    from loopexport.onnx.requirements import check_installed
    from loopexport.onnx.runtime.model import OnnxModel
    from loopexport.onnx.runtime.sampling import Sampling

    check_installed()
    choice = Sampling(**sampling)
    if choice.temperature == 0 and (choice.top_k or choice.top_p < 1 or choice.seed is not None):
        echo_note("--top-k, --top-p and --seed need --temperature; without it the answer is greedy")
    with warnings.catch_warnings(record=True) as caught:
        model = OnnxModel(directory, file, provider=provider)
    for each in caught:
        echo_note(str(each.message))
    pieces = model.stream_text(
        prompt, chat=chat, max_new_tokens=max_new_tokens, sampling=choice, prefill_chunk=prefill_chunk
    )
    reason = _echo_pieces(pieces)
    echo_piece("\n")
    if reason == "positions":
        echo_note(f"the answer was cut off: the model has only {model.max_positions} positions")


def _echo_pieces(pieces):
    """Write each piece of an answer as it comes; returns why the answer ended."""
    while True:
        try:
            echo_piece(next(pieces))
        except StopIteration as end:
            return end.value
