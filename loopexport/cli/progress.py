"""Progress bars, on stderr."""

from __future__ import annotations

import os
import sys
from typing import Any


class ByteBar:
    """A progress bar that appears with the first byte. Call it with the number of bytes just done.

    Args:
        label: the work, such as "copying weights".
        total_bytes: how many bytes to expect; 0 if unknown.
    """

    def __init__(self, label: str, total_bytes: int):
        self._label = label
        self._total_bytes = total_bytes
        self._bar: Any = None

    def __call__(self, count: int) -> None:
        from tqdm import tqdm

        if self._bar is None:
            total = self._total_bytes or None
            self._bar = tqdm(desc=self._label, total=total, unit="B", unit_scale=True, file=sys.stderr)
        self._bar.update(count)

    def close(self) -> None:
        """End the line of the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> ByteBar:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def silence_other_bars() -> None:
    """Switch off the bars of other libraries: tqdm reads its environment once, when it is imported."""
    given = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        import tqdm  # noqa: F401
    finally:
        if given is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = given


class AnswerBar:
    """A progress bar for answers. Call it with the number given so far and the number to give.

    Args:
        label: what is counted, such as "answers".
    """

    def __init__(self, label: str):
        self._label = label
        self._bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        from tqdm import tqdm

        if self._bar is None or done < self._bar.n or total != self._bar.total:  # the next kind of requests
            self.close()
            self._bar = tqdm(desc=self._label, total=total, file=sys.stderr, disable=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """End the line of the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> AnswerBar:
        return self

    def __exit__(self, *exception) -> None:
        self.close()
