"""The grid of a scan: which loops to try on a base, and which do not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from typing import Any

from loopexport.base.checkpoint import Checkpoint
from loopexport.errors import EvaluationError, SpecError
from loopexport.export.base_loop import check_layers
from loopexport.loop.cost import loop_cost
from loopexport.loop.spec import LoopSpec, make_spec, parse_span


@dataclass(frozen=True)
class Cell:
    """One loop of a grid.

    Attributes:
        name: unique in a grid, such as "8:12 K=3 anchor=0.5".
        spec: the loop.
        cost: layer evaluations per token relative to the base.
    """

    name: str
    spec: LoopSpec
    cost: float

    @property
    def start(self) -> int:
        """The first looped layer."""
        return self.spec.layers[0]

    def to_dict(self) -> dict:
        """The cell as one JSON object."""
        return {"name": self.name, "spec": self.spec.to_config_fields(), "cost": round(self.cost, 4)}


@dataclass(frozen=True)
class LeftOut:
    """A combination of the grid that is not tried.

    Attributes:
        name: as in `Cell`.
        reason: why not.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class Grid:
    """All combinations of a few values for each field of the loop.

    Attributes:
        spans: pairs or texts such as "8:12"; empty for all spans of `widths`.
        widths: widths of spans that start at layer 0, `stride`, 2 * `stride`, and so on.
        stride: layers between the starts of two spans of one width.
        steps: numbers of steps, K.
        others: values of other fields of the loop, by name.
    """

    spans: Sequence[str | tuple[int, int]] = ()
    widths: Sequence[int] = ()
    stride: int = 1
    steps: Sequence[int] = (2,)
    others: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def check(self) -> None:
        """Check what can be checked without a model.

        Raises:
            EvaluationError: there are no spans, or spans and widths, or spans and a stride, or a number is too small.
        """
        if bool(self.spans) == bool(self.widths):
            given = "both were given" if self.spans else "neither was given"
            raise EvaluationError(f"a scan needs spans such as 8:12,10:14, or widths such as 2,4; {given}: give one")
        for width in self.widths:
            if width < 1:
                raise EvaluationError(f"width {width} must be at least 1 layer")
        if self.spans and self.stride != 1:
            raise EvaluationError(
                f"stride {self.stride} has no effect on spans that are given one by one; leave out --stride, or give "
                "--width in place of --spans"
            )
        if self.stride < 1:
            raise EvaluationError(f"stride {self.stride} must be at least 1 layer")
        if not self.steps:
            raise EvaluationError("a scan needs numbers of steps, such as 2,3,6")

    def cells(self, base: Checkpoint) -> tuple[list[Cell], list[LeftOut]]:
        """The loops to try, by their first layer, and the combinations that do not fit the base.

        Raises:
            EvaluationError: nothing fits.
        """
        cells, left_out = {}, {}
        for values in self._combinations(base.num_layers):
            name = _name(values)
            try:
                cells[name] = _cell(name, values, base)
            except SpecError as error:
                left_out[name] = LeftOut(name, str(error))
        if not cells:
            reasons = {each.reason: None for each in left_out.values()}
            why = next(iter(reasons), f"the base has {base.num_layers} layers")
            raise EvaluationError(f"no loop of the grid fits {base.origin.name}: {why}")
        return sorted(cells.values(), key=lambda cell: cell.start), list(left_out.values())

    def _combinations(self, num_layers: int) -> Iterator[dict[str, Any]]:
        spans = [parse_span(each) if isinstance(each, str) else tuple(each) for each in self.spans]
        for span, steps in product(spans or self._all_spans(num_layers), self.steps):
            for others in product(*self.others.values()):
                yield {"span": span, "steps": steps, **dict(zip(self.others, others, strict=True))}

    def _all_spans(self, num_layers: int) -> list[tuple[int, int]]:
        """The spans of all widths; one that is wider than the model is left out later, with its reason."""
        return [
            (start, start + width)
            for width in self.widths
            for start in range(0, max(num_layers - width, 0) + 1, self.stride)
        ]


def _cell(name: str, values: dict[str, Any], base: Checkpoint) -> Cell:
    """Make one cell; SpecError if the loop is impossible, or the base itself."""
    spec = make_spec(**values)
    check_layers(base, spec)
    if spec.is_identity:
        raise SpecError("steps or anchor is 1, so this loop is the base")
    return Cell(name, spec, loop_cost(base, spec).multiplier)


def _name(values: dict[str, Any]) -> str:
    """The span and K, and every field that is not the default."""
    start, stop = values["span"]
    defaults = {each.name: each.default for each in fields(LoopSpec)}
    others = [
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in values.items()
        if name not in ("span", "steps") and value != defaults[name]
    ]
    return " ".join([f"{start}:{stop}", f"K={values['steps']}", *others])


def within_budget(cells: list[Cell], count: int | None, why: str) -> tuple[list[Cell], list[LeftOut]]:
    """As many cells as a budget allows, spread evenly over the grid, and the others.

    Args:
        cells: of the grid.
        count: how many may be tried; None for all.
        why: the budget in words.

    Raises:
        EvaluationError: the budget is too small for one cell.
    """
    if count is None or count >= len(cells):
        return cells, []
    if count < 1:
        raise EvaluationError(f"{why} is too small for one of the {len(cells)} loops of the grid; give a larger budget")
    kept = {index * len(cells) // count for index in range(count)}
    return (
        [cell for index, cell in enumerate(cells) if index in kept],
        [LeftOut(cell.name, f"beyond the budget: {why}") for index, cell in enumerate(cells) if index not in kept],
    )
