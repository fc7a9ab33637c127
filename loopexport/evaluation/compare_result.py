"""What `compare` found: the statistics of the pairs, and where they go."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from loopexport.export.directory import Export
from loopexport.export.results import save_results
from loopexport.export.results_file import TaskResult

from .items import Pair
from .noise import Floor
from .tasks import Prompting
from .verdicts import Comparison, compare_pairs

TASK_FIELDS = tuple(each.name for each in fields(TaskResult))
# Arguments of the engine that have a place of their own, or change no answer and are the user's business.
UNSAVED_ARGS = ("dtype", "device", "token", "hf_token", "use_auth_token", "cache_dir", "download_dir")


@dataclass(frozen=True)
class CompareResult:
    """What a comparison found.

    Attributes:
        comparisons: one for each task, then one for each group.
        pairs: the answers to every item.
        settings: what they were computed with.
        task_versions: the version of each task.
        floor: how much another batch size alone changes the base's answers; None if that was not measured.
        seconds: how long the base and the loop took, without loading.
        date: when the last answer was given, YYYY-MM-DD.
    """

    comparisons: tuple[Comparison, ...]
    pairs: tuple[Pair, ...] = field(repr=False)
    settings: dict
    task_versions: dict[str, str]
    floor: Floor | None
    seconds: dict[str, float]
    date: str

    def to_dict(self) -> dict:
        """The result for `--json`, without the items."""
        return {
            "comparisons": [each.to_dict() for each in self.comparisons],
            "settings": self.settings,
            "task_versions": self.task_versions,
            "floor": None if self.floor is None else self.floor.to_dict(),
            "seconds": self.seconds,
            "date": self.date,
        }

    def write_report(self, directory: Path) -> None:
        """Write `report.html` and `forest.png`; see `report.write_report`."""
        from .report import write_report

        settings = {**self.settings, "task_versions": self.task_versions, "seconds": self.seconds, "date": self.date}
        write_report(directory, self.comparisons, self.pairs, settings, self.floor)

    def save(self, export: Export) -> bool:
        """Write the result into the export that was compared, and into its card; see `save_results`.

        Returns:
            False if the card was edited, stays, and does not show the result.
        """
        return save_results(export.root, self._entry())

    def _entry(self) -> dict:
        """The result as an entry of `loop_results.json`."""
        settings, versions = self.settings, dict(self.settings["versions"])
        return {
            "date": self.date,
            "loopexport": versions.pop("loopexport"),
            "versions": versions,
            "dtype": settings["engine"]["dtype"],
            **{name: settings[name] for name in ("spec", "weights", "backend", "device", "seeds")},
            "settings": _saved_settings(settings),
            "tasks": [self._task_entry(each) for each in self.comparisons],
        }

    def _task_entry(self, row: Comparison) -> dict:
        values = {name: value for name, value in row.to_dict().items() if name in TASK_FIELDS}
        return {**values, "version": self.task_versions.get(row.name)}


def _saved_settings(settings: dict) -> dict:
    """The options of a comparison: a result of other ones does not replace it.

    Engine arguments and files are there only where the user gave some.
    """
    engine = {name: _public(value) for name, value in settings["engine"].items() if name not in UNSAVED_ARGS}
    given = {"model_args": engine, "files_sha256": settings["files_sha256"]}
    options = {name: settings[name] for name in (*asdict(Prompting()), "batch_size")}
    return {**options, **{name: values for name, values in given.items() if values}}


def _public(value: Any) -> Any:
    """An argument for the card, which names no path of this machine."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def result_of(pairs: list[Pair], values: dict[str, Any]) -> CompareResult:
    """The result of stored answers; see `stored.write_result`."""
    floor = (
        None
        if values["floor"] is None
        else Floor(**{**values["floor"], "batch_sizes": tuple(values["floor"]["batch_sizes"])})
    )
    comparisons = compare_pairs(pairs, values["groups"], floor)
    return CompareResult(
        tuple(comparisons),
        tuple(pairs),
        values["settings"],
        values["task_versions"],
        floor,
        values["seconds"],
        values["date"],
    )
