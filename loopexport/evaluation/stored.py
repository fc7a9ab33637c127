"""The files of a comparison's results: what every item was answered, and what it all shows."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopexport.errors import EvaluationError, one_line
from loopexport.files.json_text import json_text
from loopexport.files.staged_files import exactly, staged_files

from .items import Pair

ITEMS, RESULT = "items.jsonl", "result.json"
DIGEST = "sha256"  # of the items, and of the other values
NAMES: re.Pattern = exactly(ITEMS, RESULT)


@dataclass(frozen=True)
class Stored:
    """The finished results in a directory.

    Attributes:
        pairs: the answers to every item.
        values: the rest, as `write_result` got it, without the settings.
    """

    pairs: list[Pair]
    values: dict[str, Any]


def write_result(root: Path, pairs: list[Pair], values: dict[str, Any]) -> None:
    """Write both files, or neither.

    Raises:
        OutputError: the directory cannot be written.
    """
    with staged_files(root, NAMES, RESULT) as files:
        lines = "".join(json.dumps(pair.to_dict()) + "\n" for pair in pairs).encode()
        files.write(ITEMS, lines)
        files.write(RESULT, json_text({**values, DIGEST: _digest(lines, values)}).encode())
        files.keep()


def read_result(root: Path, settings: dict) -> Stored | None:
    """The finished results in a directory; None if there are none yet.

    Args:
        root: the directory.
        settings: what the results must have been computed with.

    Raises:
        EvaluationError: the files are damaged, or were edited.
    """
    if not (root / RESULT).is_file():
        return None
    with damaged_results(root):
        values = json.loads((root / RESULT).read_text(encoding="utf-8"))
        if values["settings"] != json.loads(json_text(settings)):
            raise ValueError("its settings were edited")
        if not (root / ITEMS).is_file():
            raise ValueError(f"{ITEMS} is missing")
        lines, digest = (root / ITEMS).read_bytes(), values.pop(DIGEST)
        if _digest(lines, values) != digest:
            raise ValueError(f"{ITEMS} or {RESULT} was edited")
        del values["settings"]
        return Stored([Pair.from_dict(json.loads(line)) for line in lines.splitlines()], values)


def _digest(lines: bytes, values: dict) -> str:
    return hashlib.sha256(lines + json_text(values).encode()).hexdigest()


@contextmanager
def damaged_results(root: Path) -> Iterator[None]:
    """Turn whatever a damaged or edited file causes into one line that says what to do."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise EvaluationError(
            f"the results in {root} are damaged ({one_line(error)}); remove {RESULT}, and run the same command again"
        ) from None
