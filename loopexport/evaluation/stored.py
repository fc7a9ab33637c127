"""The files of a comparison's results: what every item was answered, and what it all shows."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopexport.errors import EvaluationError, one_line
from loopexport.files.json_text import json_text
from loopexport.files.staged_files import exactly, staged_files

from .items import Pair

ITEMS, RESULT = "items.jsonl", "result.json"
NAMES: re.Pattern = exactly(ITEMS, RESULT)


@dataclass(frozen=True)
class Stored:
    """The finished results in a directory.

    Attributes:
        pairs: the answers to every item.
        values: the rest, as `write_result` got it.
    """

    pairs: list[Pair]
    values: dict[str, Any]


def write_result(root: Path, pairs: list[Pair], values: dict[str, Any]) -> None:
    """Write both files, or neither.

    Raises:
        OutputError: the directory cannot be written.
    """
    with staged_files(root, NAMES, RESULT) as files:
        lines = "".join(json.dumps(pair.to_dict()) + "\n" for pair in pairs)
        files.write(ITEMS, lines.encode())
        files.write(RESULT, json_text(values).encode())
        files.keep()


def read_result(root: Path) -> Stored | None:
    """The finished results in a directory; None if there are none yet.

    Raises:
        EvaluationError: the files are damaged.
    """
    if not (root / RESULT).is_file():
        return None
    try:
        lines = (root / ITEMS).read_text(encoding="utf-8").splitlines()
        return Stored([Pair.from_dict(json.loads(line)) for line in lines], json.loads((root / RESULT).read_text()))
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise EvaluationError(
            f"the results in {root} are damaged ({one_line(error)}); remove {RESULT}, and run the same command again"
        ) from None
