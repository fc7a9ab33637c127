"""The answers so far, in a file: a run that was killed goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import math
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

    def fits(self, kind: str, count: int) -> bool:
        """Whether it answers so many requests of a kind, in the form that lm-evaluation-harness wants."""
        return len(self.answers) == count and all(map(_FORMS[kind], self.answers))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_scored_choice(answer: Any) -> bool:
    return isinstance(answer, tuple) and len(answer) == 2 and _is_number(answer[0]) and isinstance(answer[1], bool)


# The form of an answer, by the method of lm-evaluation-harness's models that gives it.
_FORMS = {
    "loglikelihood": _is_scored_choice,
    "loglikelihood_rolling": _is_number,
    "generate_until": lambda answer: isinstance(answer, str),
}


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
        self._entries = {entry.key: entry for entry in ([] if path is None else _read(path))}

    def find(self, key: str, kind: str, count: int) -> Entry | None:
        """The entry with this key, or None.

        Args:
            key: see `entry_key`.
            kind: of the requests.
            count: number of requests.

        Raises:
            EvaluationError: the entry does not fit the requests, so someone edited the file.
        """
        entry = self._entries.get(key)
        if entry is not None and not entry.fits(kind, count):
            raise _damaged(self._path, "an entry does not fit its requests")
        return entry

    def add(self, entry: Entry) -> None:
        """Keep an entry, on the disk before this returns."""
        self._entries[entry.key] = entry
        if self._path is None:
            return
        try:
            with os.fdopen(_open(self._path), "ab") as file:
                file.write(f"{json.dumps(asdict(entry))}\n".encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise EvaluationError(
                f"cannot write {self._path}: {one_line(error)}; the answers so far are kept, and the same command goes "
                "on from them"
            ) from None


def _open(path: Path) -> int:
    """Open a file to read it and to append to it. A link could lead to any file of the user, so none is followed."""
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | _NO_SURPRISE, 0o644)


# A named pipe must not block the run either. Windows has neither flag.
_NO_SURPRISE = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


def _read(path: Path) -> list[Entry]:
    """The entries of a file; it is made if there is none.

    A last line without its end, which a killed run left behind, is cut off.
    """
    try:
        with os.fdopen(_open(path), "rb+") as file:
            text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            if len(whole) < len(text):
                file.truncate(len(whole))
    except OSError as error:
        raise EvaluationError(
            f"cannot use {path}: {one_line(error)}; it must be a file that can be written, and no link: remove it, or "
            "choose another --out"
        ) from None
    try:
        return [_entry(line) for line in whole.splitlines()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path, one_line(error)) from None


def _damaged(path: Path | None, why: str) -> EvaluationError:
    return EvaluationError(f"{path} is damaged ({why}); remove it to compute its answers again")


def _entry(line: bytes) -> Entry:
    fields = json.loads(line)
    # lm-evaluation-harness unpacks pairs, and some of its models give tuples
    fields["answers"] = [tuple(each) if isinstance(each, list) else each for each in fields["answers"]]
    entry = Entry(**fields)
    is_size = isinstance(entry.batch_size, int) and entry.batch_size > 0
    if not (is_size and _is_number(entry.seconds) and 0 <= entry.seconds < math.inf):
        raise ValueError(f"batch size {entry.batch_size!r} or seconds {entry.seconds!r} are not possible")
    return entry
