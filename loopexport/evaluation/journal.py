"""The answers so far, in a file: a run that was killed goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loopexport.errors import EvaluationError, one_line


@dataclass(frozen=True)
class Entry:
    """What one arm answered to one slab of requests.

    Attributes:
        key: identifies arm, requests and seed; see `entry_key`.
        answers: one for each request, as lm-evaluation-harness wants it.
        batch_size: rows of a forward.
        seconds: how long the arm took.
    """

    key: str
    answers: list
    batch_size: int
    seconds: float


def entry_key(arm: str, kind: str, seed: int, requests: Sequence[tuple]) -> str:
    """The key of an entry. It has the requests' own text, so that no answer is ever taken for another request's."""
    text = json.dumps([arm, kind, seed, [list(each) for each in requests]], sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class Journal:
    """A file of entries, one JSON object in each line; each process of a run has its own.

    Args:
        path: the file; None keeps the answers in memory only.
    """

    def __init__(self, path: Path | None):
        self._path = path
        self._entries: dict[str, Entry] = {}
        self.batch_size: int | None = None  # of the latest entry: where memory ran out, it was halved
        for entry in [] if path is None else _read(path):
            self._remember(entry)

    def find(self, key: str) -> Entry | None:
        """The entry with this key, or None."""
        return self._entries.get(key)

    def add(self, entry: Entry) -> None:
        """Keep an entry, on the disk before this returns."""
        self._remember(entry)
        if self._path is None:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(entry)) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise EvaluationError(
                f"cannot write {self._path}: {one_line(error)}; the answers so far are kept"
            ) from None

    def _remember(self, entry: Entry) -> None:
        self._entries[entry.key] = entry
        self.batch_size = entry.batch_size


def _read(path: Path) -> list[Entry]:
    """The entries of a file. A line that a killed run left half-written is cut off, so that the next begins anew."""
    if not path.exists():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        os.truncate(path, len(whole))
    try:
        return [Entry(**_entry_fields(line)) for line in whole.splitlines()]
    except (ValueError, TypeError) as error:
        raise EvaluationError(
            f"{path} is damaged ({one_line(error)}); remove it to compute its answers again"
        ) from None


def _entry_fields(line: bytes) -> dict[str, Any]:
    fields = json.loads(line)
    # lm-evaluation-harness unpacks pairs, and some of its models give tuples
    fields["answers"] = [tuple(each) if isinstance(each, list) else each for each in fields["answers"]]
    return fields
