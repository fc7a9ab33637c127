"""Options of `scan` alone: the grid, the split of the items, and the budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from loopexport.templates.looped_spec import DECODE_MODES, KV_POLICIES, MODES, RULES

from .evaluation_options import CommaList
from .groups import LOOP, TASKS, Words, combine, option


class Values(CommaList):
    """Values with commas between them.

    Args:
        kind: `int` or `float`, which parses one value, or a Click type.
    """

    def __init__(self, kind: Callable[[str], Any] | click.ParamType):
        self._kind = click.types.convert_type(kind)

    def convert(self, value, param, ctx) -> tuple[Any, ...]:
        """Parse the values."""
        if isinstance(value, tuple):
            return value
        return tuple(self._kind.convert(word, param, ctx) for word in super().convert(value, param, ctx))


grid_options = combine(
    option(
        LOOP,
        "--spans",
        type=CommaList(),
        default=(),
        metavar="START:STOP,...",
        help="Spans to try, half-open, such as 8:12,10:14. Give these or --width.",
    ),
    option(
        LOOP,
        "--width",
        "widths",
        type=Values(int),
        default=(),
        metavar="N,...",
        help="Try spans of these widths over the whole depth.",
    ),
    option(
        LOOP,
        "--stride",
        type=int,
        default=1,
        show_default=True,
        metavar="N",
        help="With --width: layers between the starts of two spans.",
    ),
    option(
        LOOP,
        "--steps",
        type=Values(int),
        default=(2,),
        metavar="K,...",
        help="Numbers of steps.  [default: 2]",
    ),
    option(
        LOOP,
        "--damping",
        type=Values(float),
        default=(None,),
        metavar="S,...",
        help="Step sizes in (0, 1].  [default: the rule's]",
    ),
    option(
        LOOP,
        "--anchor",
        type=Values(float),
        default=(0.0,),
        metavar="BETA,...",
        help="Weights of the natural pass in the output.  [default: 0]",
    ),
    option(
        LOOP,
        "--mode",
        type=Values(Words(MODES)),
        default=("block",),
        metavar="NAME,...",
        help="block, layer, or both.  [default: block]",
    ),
    option(
        LOOP,
        "--rule",
        type=Values(Words(tuple(RULES))),
        default=("euler",),
        metavar="NAME,...",
        help="Update rules; see `loopexport rules`.  [default: euler]",
    ),
    option(
        LOOP,
        "--kv",
        type=Values(Words(KV_POLICIES)),
        default=("shared",),
        metavar="NAME,...",
        help="K/V policies: shared, per_step, reference.  [default: shared]",
    ),
    option(
        LOOP,
        "--decode",
        type=Words([mode for mode in DECODE_MODES if mode != "first_n"]),
        default="full",
        show_default=True,
        help="Decode steps that loop, in all cells.",
    ),
    option(
        LOOP,
        "--frozen-routing",
        is_flag=True,
        help="In all cells: iterations use the experts that the natural pass chose (sparse MoE).",
    ),
    option(
        LOOP,
        "--norm-interpolation",
        is_flag=True,
        help="In all cells: rescale each iterate to a norm between |x| and |n|.",
    ),
    option(
        LOOP,
        "--max-evaluations",
        type=int,
        metavar="N",
        help="Try at most N loops, spread evenly over the grid.",
    ),
    option(
        LOOP,
        "--max-hours",
        type=float,
        metavar="HOURS",
        help="Try only as many loops as fit, by an estimate from a few items.",
    ),
    option(
        TASKS,
        "--test-share",
        type=float,
        default=0.5,
        show_default=True,
        help="About how much of the items is kept for the test of the best loops.",
    ),
    option(
        TASKS,
        "--finalists",
        type=int,
        default=3,
        show_default=True,
        metavar="N",
        help="How many loops are tested, at most. Loops that are not better on the selection part never are.",
    ),
)
