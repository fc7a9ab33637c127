"""`--span auto`: guess a span for a model without measurements, and say that it is a guess."""

from __future__ import annotations

from loopexport.base.checkpoint import Checkpoint

AUTO = "auto"
WIDTH = 4  # the best width on the authors' models

# Centres of the authors' spans as fractions of the depth: 15:19 of 36 (Qwen3-4B), 29:33 of 48 (Qwen3-30B-A3B,
# generation). Their centres are at 0.42-0.52 for dense models and about 0.60-0.67 for sparse ones.
DENSE_CENTRE = 0.47
SPARSE_CENTRE = 0.64


def auto_span(base: Checkpoint) -> tuple[int, int]:
    """A half-open span at the depth of the authors' best spans. It is a guess: other models lost with such spans."""
    width = min(WIDTH, base.num_layers)
    start = round(_centre(base) * base.num_layers - width / 2)
    start = max(0, min(start, base.num_layers - width))
    return start, start + width


def why_auto_span(base: Checkpoint) -> str:
    """How `auto_span` chose its span, and that it is a heuristic, in one line."""
    start, stop = auto_span(base)
    kind = "sparse" if base.is_sparse else "dense"
    return (
        f"span auto is {start}:{stop}, a heuristic: width {stop - start}, centred at {_centre(base):.2f} of the depth, "
        f"like the authors' best span on a {kind} model; other models lost with such spans"
    )


def _centre(base: Checkpoint) -> float:
    return SPARSE_CENTRE if base.is_sparse else DENSE_CENTRE
