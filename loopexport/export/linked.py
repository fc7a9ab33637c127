"""A directory that loads as an export would, for as long as it is needed: its weights are links to the base's."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .conversion import ConvertPlan


@contextmanager
def linked_export(plan: ConvertPlan) -> Iterator[Path]:
    """The directory of a conversion, in a temporary folder and without a manifest; removed at the end.

    Its name is that of the plan's output, since transformers caches remote code by the name of the directory.
    """
    with tempfile.TemporaryDirectory(prefix="loopexport-") as folder:
        root = Path(folder) / plan.out.name
        for name, content in plan.files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
        for shard in plan.base.shards:
            os.symlink(os.path.realpath(shard.path), root / shard.name)
        yield root
