"""A progress bar for bytes, on stderr."""

from __future__ import annotations

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
