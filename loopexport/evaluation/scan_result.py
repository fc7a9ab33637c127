"""What a scan found, and its files: JSON, CSV, and heatmaps."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopexport.errors import EvaluationError, one_line
from loopexport.files.json_text import json_text
from loopexport.files.staged_files import staged_files
from loopexport.loop.spec import LoopSpec
from loopexport.templates.looped_spec import FIELD_PREFIX

from .grid import Cell, LeftOut
from .heatmap import heatmap_png
from .verdicts import Comparison

RESULT, TABLE = "scan.json", "cells.csv"
DIGEST = "sha256"  # of the other values
NAMES = re.compile(r"scan\.json|cells\.csv|heatmap-[\w.=-]+\.png")
COLUMNS = ("cell", "part", "start", "width", "steps", "cost", "n", "difference", "low", "high", "gained", "lost", "p")


@dataclass(frozen=True)
class CellResult:
    """What one loop of the grid did.

    Attributes:
        cell: the loop.
        selection: against the base on the selection part, all tasks together.
        test: on the test part, with p adjusted for the number of finalists; None for a loop that was not tested.
        test_tasks: the same for each task, as information: the verdict is that of `test`.
    """

    cell: Cell
    selection: Comparison
    test: Comparison | None
    test_tasks: tuple[Comparison, ...]

    def to_dict(self) -> dict:
        """The result as one JSON object."""
        return {
            **self.cell.to_dict(),
            "selection": self.selection.to_dict(),
            "test": None if self.test is None else self.test.to_dict(),
            "test_tasks": [each.to_dict() for each in self.test_tasks],
        }

    @classmethod
    def from_dict(cls, values: dict) -> CellResult:
        """The result that `to_dict` described."""
        spec = {name.removeprefix(FIELD_PREFIX): value for name, value in values["spec"].items()}
        return cls(
            Cell(values["name"], LoopSpec(**spec), values["cost"]),
            Comparison(**values["selection"]),
            None if values["test"] is None else Comparison(**values["test"]),
            tuple(Comparison(**each) for each in values["test_tasks"]),
        )


@dataclass(frozen=True)
class ScanResult:
    """What a scan found.

    Attributes:
        cells: all loops, by their difference on the selection part, the best first.
        left_out: the combinations that were not tried.
        recommended: the name of the loop that the test confirms; None if there is none, which is a result too.
        items: how many items each part has.
        settings: what the scan was computed with.
        seconds: how long each arm took, without loading.
        shared: the share of layer evaluations that the loops took over from each other.
        not_shared: why they took over nothing; empty if they did, or had nothing to take.
    """

    cells: tuple[CellResult, ...]
    left_out: tuple[LeftOut, ...]
    recommended: str | None
    items: dict[str, int]
    settings: dict
    seconds: dict[str, float]
    shared: float
    not_shared: str

    @property
    def finalists(self) -> list[CellResult]:
        """The loops that were tested."""
        return [each for each in self.cells if each.test is not None]

    def to_dict(self) -> dict:
        """The result for `--json`, without the items."""
        return {
            "recommended": self.recommended,
            "items": self.items,
            "cells": [each.to_dict() for each in self.cells],
            "left_out": {each.name: each.reason for each in self.left_out},
            "shared": round(self.shared, 4),
            "not_shared": self.not_shared,
            "settings": self.settings,
            "seconds": self.seconds,
        }

    @classmethod
    def from_dict(cls, values: dict) -> ScanResult:
        """The result that `to_dict` described."""
        return cls(
            **{
                **values,
                "cells": tuple(CellResult.from_dict(each) for each in values["cells"]),
                "left_out": tuple(LeftOut(*each) for each in values["left_out"].items()),
            }
        )

    def to_csv(self) -> str:
        """All cells as CSV: one line for the selection part, and one for the test part where there is one."""
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for each in self.cells:
            writer.writerow(_row(each.cell, "selection", each.selection))
            if each.test is not None:
                writer.writerow(_row(each.cell, "test", each.test))
        return text.getvalue()

    def heatmaps(self) -> dict[str, bytes]:
        """PNG pictures of the selection part by file name: one for each K, and for each value of the other fields."""
        pictures = defaultdict(list)
        for each in self.cells:
            _, *rest = each.cell.name.split(" ")
            pictures["-".join(["heatmap", *rest]) + ".png"].append(_row(each.cell, "selection", each.selection))
        return {name: heatmap_png(rows) for name, rows in pictures.items()}


def _row(cell: Cell, part: str, comparison: Comparison) -> dict[str, Any]:
    layers = cell.spec.layers
    own = {
        "cell": cell.name,
        "part": part,
        "start": layers[0],
        "width": len(layers),
        "steps": cell.spec.steps,
        "cost": cell.cost,
        "p": comparison.final_p,
    }
    return own | {name: getattr(comparison, name) for name in COLUMNS if name not in own}


def write_scan(root: Path, result: ScanResult) -> None:
    """Write the files of a result: all, or none.

    Raises:
        OutputError: the directory cannot be written.
    """
    with staged_files(root, NAMES, RESULT) as files:
        for name, picture in result.heatmaps().items():
            files.write(name, picture)
        files.write(TABLE, result.to_csv().encode())
        files.write(RESULT, json_text({**result.to_dict(), DIGEST: _digest(result.to_dict())}).encode())
        files.keep()


def _digest(values: dict) -> str:
    return hashlib.sha256(json_text(values).encode()).hexdigest()


def read_scan(root: Path, settings: dict) -> ScanResult | None:
    """The finished result in a directory; None if there is none yet.

    Args:
        root: the directory.
        settings: what the result must have been computed with.

    Raises:
        EvaluationError: the file is damaged, or was edited.
    """
    path = root / RESULT
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop(DIGEST) != _digest(values) or values["settings"] != json.loads(json_text(settings)):
            raise ValueError("it was edited")
        return ScanResult.from_dict(values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise EvaluationError(
            f"{path} is damaged ({one_line(error)}); remove it, and run the same command again"
        ) from None
