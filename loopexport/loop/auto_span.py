"""Guesses, labelled as such: a span for a model on which nothing was measured."""

from __future__ import annotations

from loopexport.base.checkpoint import Checkpoint

AUTO = "auto"
WIDTH = 4  # the best width on the authors' models

# Where the authors' spans are centred, as fractions of the depth: 15:19 of 36 (Qwen3-4B), 29:33 of 48 (Qwen3-30B-A3B,
# generation). Their spans lie within 0.42-0.52 of dense models and around 0.60-0.67 of sparse ones.
DENSE_CENTRE = 0.47
SPARSE_CENTRE = 0.64


def auto_span(base: Checkpoint) -> tuple[int, int]:
    """A span at the depth at which the authors' best spans lie. It is a guess: they saw other models lose there."""
    width = min(WIDTH, base.num_layers)
    start = round(_centre(base) * base.num_layers - width / 2)
    start = max(0, min(start, base.num_layers - width))
    return start, start + width


def why_auto_span(base: Checkpoint) -> str:
    """Where `auto_span` comes from, and what it is worth."""
    start, stop = auto_span(base)
    kind = "sparse" if base.is_sparse else "dense"
    return (
        f"span auto is {start}:{stop}, a heuristic: width {stop - start}, centred at {_centre(base):.2f} of the depth, "
        f"as the best span that the authors found on a {kind} model; on others, such spans lost"
    )


def _centre(base: Checkpoint) -> float:
    return SPARSE_CENTRE if base.is_sparse else DENSE_CENTRE
