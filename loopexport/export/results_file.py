"""`loop_results.json`: what `loopexport compare --save` measured with an export. The file may be a stranger's."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loopexport.base.checkpoint import read_json
from loopexport.errors import CheckpointError, ExportError, SpecError, one_line
from loopexport.files.digests import file_sha256
from loopexport.files.links import check_link
from loopexport.loop.spec import LoopSpec, make_spec
from loopexport.templates.looped_spec import FIELD_PREFIX

from .directory import Export
from .stale_graphs import loop_difference

RESULTS = "loop_results.json"
FORMAT = 1
VERDICTS = ("better", "worse", "inconclusive")

MAX_BYTES = 16 * 2**20
MAX_CHARS = 200  # of one text
MAX_NUMBER = 2**53  # larger integers are not exact in other JSON readers
DATE = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)


@dataclass(frozen=True)
class TaskResult:
    """The scores of a base and its loop on one task, or on a group of tasks. Larger scores are better.

    Attributes:
        name, version, metric: of the task in lm-evaluation-harness; a group may have no version.
        is_group: whether it pools the items of several tasks.
        n: number of items; several seeds of an item count once.
        base, loop: mean scores.
        difference: score of the loop minus score of the base.
        low, high: the confidence interval of the difference; None if there is none.
        confidence: its level, such as 0.95.
        method: how the interval was computed.
        gained, lost: number of items on which the loop was better, and on which it was worse.
        p, p_holm: p-value of the difference, alone and adjusted for the number of tasks; None if there is none.
        verdict: one of `VERDICTS`.
        smallest_difference: the difference that so many items find with 80 % power.
        items_needed: how many items find the measured difference with 80 % power; None if it is 0.
        base_nan, loop_nan: number of answers that were NaN, which count as wrong.
    """

    name: str
    version: float | str | None
    metric: str
    is_group: bool
    n: int
    base: float
    loop: float
    difference: float
    low: float | None
    high: float | None
    confidence: float | None
    method: str | None
    gained: int | None
    lost: int | None
    p: float | None
    p_holm: float | None
    verdict: str
    smallest_difference: float | None
    items_needed: int | None
    base_nan: int = 0
    loop_nan: int = 0


@dataclass(frozen=True)
class RecordedResult:
    """One comparison of a loop with its base.

    Attributes:
        date: its day, as YYYY-MM-DD.
        loopexport: version of LoopExport.
        spec: the loop that was measured.
        weights: `Manifest.weights_digest` of the export; None if it was not known.
        backend: the runtime, such as hf or vllm.
        dtype, device: of the computation.
        versions: of the other packages, by name.
        seeds: the random seeds.
        settings: the options of the comparison, by name.
        tasks: the results of its tasks and groups.
    """

    date: str
    loopexport: str
    spec: LoopSpec
    weights: str | None
    backend: str
    dtype: str
    device: str
    versions: dict[str, str]
    seeds: tuple[int, ...]
    settings: dict[str, Any]
    tasks: tuple[TaskResult, ...]

    @property
    def key(self) -> tuple:
        """A later result with an equal key replaces this one: the same loop, tasks and settings."""
        tasks = sorted((task.name, task.metric) for task in self.tasks)
        loop = (self.spec.step_size, asdict(self.spec) | {"damping": None})
        return loop, self.weights, self.backend, self.dtype, self.seeds, self.settings, tasks

    def to_dict(self) -> dict:
        """The result as one JSON object."""
        return {**asdict(self), "spec": self.spec.to_config_fields()}


@dataclass(frozen=True)
class Measured:
    """The recorded results of an export.

    Attributes:
        own: those of its current loop and weights.
        other: those of another loop or of other weights. They say nothing about the export as it is now.
    """

    own: tuple[RecordedResult, ...] = ()
    other: tuple[RecordedResult, ...] = ()

    def to_dict(self) -> dict:
        """The results for `--json`."""
        return {"own": [each.to_dict() for each in self.own], "other": [each.to_dict() for each in self.other]}


def measured(export: Export) -> Measured:
    """The recorded results of an export; none where the file is missing, or is not part of the export.

    Raises:
        ExportError: the file has changed since it was written, or is damaged; the message says what to do.
    """
    record, path = export.manifest.files.get(RESULTS), export.root / RESULTS
    if record is None or not os.path.isfile(path):
        return Measured()
    results = read_results(export.root)
    if file_sha256(path) != record.sha256:
        raise ExportError(f"{path} has changed since it was written; {remedy(export.root)}")
    own = tuple(result for result in results if _is_own(result, export))
    return Measured(own, tuple(result for result in results if result not in own))


def _is_own(result: RecordedResult, export: Export) -> bool:
    digests = (result.weights, export.manifest.weights_digest)
    is_same_weights = None in digests or digests[0] == digests[1]
    return is_same_weights and not loop_difference(RESULTS, result.spec, export.spec)


def read_results(root: Path) -> tuple[RecordedResult, ...]:
    """Read and check the results in a directory; empty if it has none.

    Raises:
        ExportError: the file is damaged; the message says where, and what to do.
    """
    path = root / RESULTS
    if not os.path.lexists(path):
        return ()
    try:
        check_link(root, RESULTS)
        if path.is_file() and path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
        values = read_json(path)
        if values.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}; a later LoopExport may read it")
        return tuple(parse_result(each) for each in _list(values, "results"))
    except (CheckpointError, OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{path} is damaged ({one_line(error, 300)}); {remedy(root)}") from None


def remedy(root: Path) -> str:
    """What to do about a damaged file of results."""
    return f"remove it and run `loopexport compare {root} --tasks TASKS --save` again"


def parse_result(values: object) -> RecordedResult:
    """Check one result. Unknown keys are ignored, since a later version may write more.

    Raises:
        ValueError: a value is missing or not allowed; the message names it.
    """
    values = _object(values, "result")
    return RecordedResult(
        date=_date(values),
        loopexport=_text(values, "loopexport"),
        spec=_spec(values),
        weights=_optional(_text, values, "weights"),
        backend=_text(values, "backend"),
        dtype=_text(values, "dtype"),
        device=_text(values, "device"),
        versions={_line(name, "versions"): _line(each, name) for name, each in _mapping(values, "versions").items()},
        seeds=tuple(_whole(each, "seeds") for each in _list(values, "seeds")),
        settings={_line(name, "settings"): _plain(each, name) for name, each in _mapping(values, "settings").items()},
        tasks=tuple(_task(_object(each, "task")) for each in _list(values, "tasks")),
    )


def _task(values: dict) -> TaskResult:
    task = TaskResult(
        name=_text(values, "name"),
        version=_version(values),
        metric=_text(values, "metric"),
        is_group=_flag(values, "is_group"),
        n=_count(values, "n"),
        base=_number(values, "base"),
        loop=_number(values, "loop"),
        difference=_number(values, "difference"),
        low=_optional(_number, values, "low"),
        high=_optional(_number, values, "high"),
        confidence=_optional(_share, values, "confidence"),
        method=_optional(_text, values, "method"),
        gained=_optional(_count, values, "gained"),
        lost=_optional(_count, values, "lost"),
        p=_optional(_share, values, "p"),
        p_holm=_optional(_share, values, "p_holm"),
        verdict=_verdict(values),
        smallest_difference=_optional(_number, values, "smallest_difference"),
        items_needed=_optional(_count, values, "items_needed"),
        base_nan=_later_count(values, "base_nan"),
        loop_nan=_later_count(values, "loop_nan"),
    )
    _check_consistent(task)
    return task


def _check_consistent(task: TaskResult) -> None:
    """Refuse scores, intervals and verdicts that contradict each other."""
    if abs(task.loop - task.base - task.difference) > 1e-3 * max(1, abs(task.loop), abs(task.base)):
        raise ValueError(f"difference {task.difference!r} is not {task.loop!r} minus {task.base!r}")
    if (task.low is None) != (task.high is None):
        raise ValueError("low and high are one interval; give both or neither")
    low, high = (0.0, 0.0) if task.low is None or task.high is None else (task.low, task.high)
    if low > high:
        raise ValueError(f"low {low!r} is above high {high!r}")
    if (task.verdict == "better" and low <= 0) or (task.verdict == "worse" and high >= 0):
        raise ValueError(f"verdict {task.verdict} contradicts the interval [{task.low!r}, {task.high!r}]")


def _value(values: dict, name: str) -> Any:
    if name not in values:
        raise ValueError(f"{name} is missing")
    return values[name]


def _optional(check, values: dict, name: str) -> Any:
    return None if _value(values, name) is None else check(values, name)


def _refusal(name: str, value: object, allowed: str) -> ValueError:
    return ValueError(f"{name} {repr(value)[:80]} is not {allowed}")


def _object(value: object, name: str) -> dict:
    if not isinstance(value, dict):
        raise _refusal(name, value, "an object")
    return value


def _mapping(values: dict, name: str) -> dict:
    return _object(_value(values, name), name)


def _list(values: dict, name: str) -> list:
    value = _value(values, name)
    if not isinstance(value, (list, tuple)):
        raise _refusal(name, value, "a list")
    return list(value)


def _line(value: object, name: str) -> str:
    if not isinstance(value, str) or not value.isprintable() or len(value) > MAX_CHARS:
        raise _refusal(name, value, f"one line of at most {MAX_CHARS} characters")
    return value


def _text(values: dict, name: str) -> str:
    text = _line(_value(values, name), name)
    if not text.strip():
        raise _refusal(name, text, "a text with something in it")
    return text


def _finite(value: Any, name: str) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not abs(value) <= MAX_NUMBER:  # NaN is not
        raise _refusal(name, value, f"a number of at most {MAX_NUMBER:,}")
    return value


def _number(values: dict, name: str) -> float:
    return _finite(_value(values, name), name)


def _share(values: dict, name: str) -> float:
    value = _number(values, name)
    if not 0 <= value <= 1:
        raise _refusal(name, value, "between 0 and 1")
    return value


def _whole(value: Any, name: str) -> int:
    if type(value) is not int or abs(value) > MAX_NUMBER:
        raise _refusal(name, value, f"a whole number of at most {MAX_NUMBER:,}")
    return value


def _count(values: dict, name: str) -> int:
    value = _whole(_value(values, name), name)
    if value < 0:
        raise _refusal(name, value, "0 or more")
    return value


def _later_count(values: dict, name: str) -> int:
    """A count that earlier versions did not write: 0 in their files."""
    return _count(values, name) if name in values else 0


def _flag(values: dict, name: str) -> bool:
    value = _value(values, name)
    if type(value) is not bool:
        raise _refusal(name, value, "true or false")
    return value


def _date(values: dict) -> str:
    date = _text(values, "date")
    if not DATE.fullmatch(date):
        raise _refusal("date", date, "YYYY-MM-DD")
    return date


def _version(values: dict) -> float | str | None:
    value = _value(values, "version")
    return value if value is None else _line(value, "version") if isinstance(value, str) else _finite(value, "version")


def _verdict(values: dict) -> str:
    verdict = _value(values, "verdict")
    if verdict not in VERDICTS:
        raise _refusal("verdict", verdict, f"one of {', '.join(VERDICTS)}")
    return verdict


def _spec(values: dict) -> LoopSpec:
    try:
        return make_spec(**{name.removeprefix(FIELD_PREFIX): each for name, each in _mapping(values, "spec").items()})
    except (SpecError, TypeError) as error:
        raise ValueError(f"spec is not a loop: {error}") from None


def _plain(value: object, name: str) -> Any:
    """A value of the settings: texts, numbers, true, false and null, in lists and objects too.

    A text may have any characters, such as the line break that ends an answer: the card escapes and cuts it.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, dict):
        return {_string(key, name): _plain(each, name) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each, name) for each in value]
    return _finite(value, name)


def _string(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise _refusal(name, value, "a text")
    return value
