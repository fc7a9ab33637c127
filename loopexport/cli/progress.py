"""A byte counter on stderr for long work."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from loopexport.files.digests import Progress


@contextmanager
def byte_progress(label: str, total_bytes: int) -> Iterator[Progress]:
    """Yield a function that advances a bar of `total_bytes`; the bar appears with the first byte."""
    from tqdm import tqdm

    bars: list = []

    def advance(count: int) -> None:
        if not bars:
            bars.append(tqdm(desc=label, total=total_bytes or None, unit="B", unit_scale=True, file=sys.stderr))
        bars[0].update(count)

    try:
        yield advance
    finally:
        for bar in bars:
            bar.close()
