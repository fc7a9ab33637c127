"""Put the weights of an export in place, and record them."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

from loopexport.base.checkpoint import Checkpoint, Shard
from loopexport.base.extraction import MadeShard
from loopexport.choices import Weights
from loopexport.errors import OutputError
from loopexport.files.digests import Progress, file_xxh3
from loopexport.files.output import check_space
from loopexport.files.placement import place, settle_method

from .manifest import FileRecord

WITHOUT = "none"  # leave the weights on the Hub, where `push` copies them
METHODS = get_args(Weights)
COPYING = ("auto", "copy")  # methods that may need disk space for every file


def check_method(base: Checkpoint, method: str) -> None:
    """Check that the weights of a base can be put in place by a method.

    Raises:
        OutputError: they cannot; use another one.
    """
    if method == WITHOUT:
        _check_copyable(base)
    if method not in COPYING and all(isinstance(shard, MadeShard) for shard in base.shards):
        raise OutputError(
            f"--weights {method} cannot share a file: each of them holds more than the language model, or under other "
            "names; use --weights auto"
        )


def copied_bytes(base: Checkpoint, method: str) -> int:
    """Disk space for the weights, at most; a reflink or a hard link needs none, a file to be made always does."""
    shards = base.shards if method in COPYING else [] if method == WITHOUT else made_shards(base)
    return sum(shard.size for shard in shards)


def made_shards(base: Checkpoint) -> list[MadeShard]:
    """The weights files that are made of some tensors of the base's files; empty unless only a part is exported."""
    return [shard for shard in base.shards if isinstance(shard, MadeShard)]


def place_weights(
    base: Checkpoint, root: Path, method: str, progress: Progress = lambda count: None
) -> tuple[dict[str, FileRecord], str]:
    """Put every weights file in place. Other threads hash files without a known sha256 meanwhile.

    Args:
        base: the base.
        root: the directory of the export.
        method: one of `METHODS`.
        progress: called with the number of bytes just copied.

    Returns:
        The records of the files by name, and the method that was used.

    Raises:
        CheckpointError: a file of the base cannot be read.
        OutputError: a file cannot be written.
    """
    if method == WITHOUT:
        return {
            each.name: FileRecord(each.size, each.sha256, None, each.header.sha256 or None) for each in base.shards
        }, WITHOUT
    method = settle_method(method, base.shards[0].path, root)
    space = copied_bytes(base, method)
    if space:
        check_space(root, space)
    with ThreadPoolExecutor(os.cpu_count()) as hashing:
        digests = {}
        for shard in base.shards:
            is_made = isinstance(shard, MadeShard)
            if method == "copy" and shard.sha256 is None and not is_made:
                digests[shard.name] = hashing.submit(file_xxh3, shard.path)
            _place_shard(shard, root / shard.name, method, progress)
            if is_made:
                digests[shard.name] = hashing.submit(file_xxh3, root / shard.name)
    xxh3 = {name: digest.result() for name, digest in digests.items()}
    return {
        each.name: FileRecord(each.size, each.sha256, xxh3.get(each.name), each.header.sha256) for each in base.shards
    }, method


def _place_shard(shard: Shard, target: Path, method: str, progress: Progress) -> None:
    if isinstance(shard, MadeShard):
        shard.write(target, progress)
    else:
        place(shard.path, target, method, progress)
    if target.stat().st_size != shard.size:
        raise OutputError(f"{shard.path} changed while it was read; run the same command again")


def _check_copyable(base: Checkpoint) -> None:
    """Check that the Hub can copy the weights later: `push` identifies them by their sha256."""
    if made_shards(base):
        raise OutputError("--weights none needs files that the Hub has, and --text-only makes new ones; leave one out")
    if base.origin.revision is None:
        raise OutputError(
            f"--weights none needs a base on the Hub, and {base.origin.name} is a local directory; "
            "use another --weights method"
        )
    unknown = [shard.name for shard in base.shards if shard.sha256 is None]
    if unknown:
        raise OutputError(f"--weights none needs the sha256 of {unknown[0]}, and the Hub has none; use --weights copy")
