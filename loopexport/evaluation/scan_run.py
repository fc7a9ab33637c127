"""A scan that is ready, and how it runs: all loops on the selection part, then the best of them on the test part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .arms import Arm, Model, base_arm
from .comparison import ComparePlan
from .grid import Cell, LeftOut, within_budget
from .items import Pair
from .journal import Journal
from .prefix import SharedPrefix
from .scan_result import CellResult, ScanResult, read_scan, write_scan
from .selection import Split, choose_finalists, judge_finalists, pooled, recommended, split_items
from .settings import results_directory
from .verdicts import Comparison, compare_pairs

TIMED_ITEMS = 8  # of each task, to estimate the hours of a scan

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ScanPlan:
    """A scan that is checked and ready; `run` carries it out.

    Attributes:
        compare: the comparison with the first cell; it has the model, the tasks, and how to ask.
        cells: the loops to try, by their first layer.
        left_out: the combinations of the grid that are not tried.
        test_share: about how much of the items is for the test.
        finalists: how many loops answer the test part, at most.
        max_hours: how long the scan may take by estimate; None for any time.
        out: the directory that keeps the results, or None.
        settings: what the results depend on.
    """

    compare: ComparePlan
    cells: tuple[Cell, ...]
    left_out: tuple[LeftOut, ...]
    test_share: float
    finalists: int
    max_hours: float | None
    out: Path | None
    settings: dict

    @property
    def cost(self) -> float:
        """Layer evaluations of the whole scan at most, in runs of the base over all items."""
        return self._cost(sorted((cell.cost for cell in self.cells), reverse=True))

    def _cost(self, costs: Sequence[float]) -> float:
        selection, test = 1 + sum(costs), 1 + sum(costs[: self.finalists])
        return (1 - self.test_share) * selection + self.test_share * test

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know, one line each."""
        kept = "without --out, no answer is kept: a scan that is stopped has to begin again"
        return (kept,) if self.out is None else ()

    def to_dict(self) -> dict:
        """The plan for `--json`."""
        return {
            "settings": self.settings,
            "warnings": list(self.warnings),
            "cells": [cell.to_dict() for cell in self.cells],
            "left_out": {each.name: each.reason for each in self.left_out},
            "cost_in_base_runs": round(self.cost, 2),
        }

    def run(self, progress: Progress = lambda done, total: None) -> ScanResult:
        """Answer the items, choose, and test; what `out` has already is not computed again.

        Args:
            progress: called with the numbers of answers given, and to give, of the requests at hand.

        Raises:
            EvaluationError: a task cannot be loaded or run, the model cannot, a part of the items is empty, the hours
                are too few for one loop, or `out` has other results.
        """
        if self.out is None:
            return self._run(Journal(None), progress)
        stored = read_scan(self.out, self.settings)
        if stored is not None:
            return stored
        with results_directory(self.out, self.settings):
            result = self._run(Journal(self.out / "answers.jsonl"), progress)
        write_scan(self.out, result)
        return result

    def _run(self, journal: Journal, progress: Progress) -> ScanResult:
        from .measurement import Measurement  # imports lm-evaluation-harness

        source, prefix = self.compare.tasks, SharedPrefix()
        tasks = source.load()
        split = split_items(tasks["tasks"], self.compare.prompting.limit, self.test_share)
        with self.compare.subject.directory() as root:
            model = Model(root, "hf", self.compare.engine, self.compare.batch_size, prefix=prefix)
            measurement = Measurement(
                model, journal, tasks, self.compare.prompting, metric=source.metric, progress=progress
            )
            return _Scan(self, measurement, split).result(prefix)

    def affordable(self, seconds_per_item: float, items: int) -> tuple[list[Cell], list[LeftOut]]:
        """The cells for which the hours suffice, and the others.

        Args:
            seconds_per_item: of the base.
            items: in both parts, each as often as it is asked.
        """
        cells = list(self.cells)
        if self.max_hours is None:
            return cells, []
        most = sum(self._hours(count, seconds_per_item, items) <= self.max_hours for count in range(1, len(cells) + 1))
        needed = self._hours(1, seconds_per_item, items)
        return within_budget(cells, most, f"{self.max_hours:g} hours (one loop takes {needed:.2g})")

    def _hours(self, count: int, seconds_per_item: float, items: int) -> float:
        mean = sum(cell.cost for cell in self.cells) / len(self.cells)
        return self._cost([mean] * count) * seconds_per_item * items / 3600


class _Scan:
    """One scan: the selection, then the test."""

    def __init__(self, plan: ScanPlan, measurement, split: Split):
        self._plan, self._measurement, self._split = plan, measurement, split
        self._base = base_arm(plan.cells[0].spec)
        self._seeds = plan.compare.seeds

    def result(self, prefix: SharedPrefix) -> ScanResult:
        cells, beyond = self._plan.affordable(*self._timing())
        by_name = {cell.name: cell for cell in cells}
        selection = {name: pooled(pairs) for name, pairs in self._pairs(cells, self._split.selection)}
        names = choose_finalists(selection, {cell.name: cell.cost for cell in cells}, self._plan.finalists)
        pairs = dict(self._pairs([cell for cell in cells if cell.name in names], self._split.test))
        test = judge_finalists({name: pooled(pairs[name]) for name in names})
        return ScanResult(
            cells=tuple(
                CellResult(by_name[name], each, test.get(name), tuple(_by_task(pairs.get(name))))
                for name, each in sorted(selection.items(), key=lambda item: -item[1].difference)
            ),
            left_out=(*self._plan.left_out, *beyond),
            recommended=recommended(test),
            items={"selection": _count(self._split.selection), "test": _count(self._split.test)},
            settings=self._plan.settings,
            seconds=self._measurement.seconds,
            shared=prefix.saved / prefix.evaluations if prefix.evaluations else 0.0,
            not_shared=prefix.off,
        )

    def _pairs(self, cells: Sequence[Cell], items: dict[str, list[int]]) -> Iterable[tuple[str, list[Pair]]]:
        arms = [Arm(cell.name, cell.spec) for cell in cells]
        return self._measurement.pairs_by_loop(self._base, arms, self._seeds, items) if arms else ()

    def _timing(self) -> tuple[float, int]:
        """Seconds of the base for an item, on a few items whose answers are kept; and how many items there are."""
        total = _count(self._split.selection) + _count(self._split.test)
        if self._plan.max_hours is None:
            return 0.0, total
        few = {name: numbers[:TIMED_ITEMS] for name, numbers in self._split.selection.items()}
        self._measurement.pairs(self._base, [], self._seeds[:1], few)
        return self._measurement.seconds[self._base.name] / _count(few), total * len(self._seeds)


def _by_task(pairs: list[Pair] | None) -> list[Comparison]:
    return compare_pairs(pairs) if pairs else []


def _count(items: dict[str, list[int]]) -> int:
    return sum(map(len, items.values()))
