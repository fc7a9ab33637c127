"""Take the language model out of a multimodal checkpoint, for `--text-only`, without loading it.

A weights file in which the text family reads every tensor stays as it is. From any other, the tensors of the language
model go byte for byte into a new file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path

from loopexport.errors import CheckpointError
from loopexport.files.digests import Progress, open_to_read
from loopexport.files.json_text import json_text
from loopexport.files.placement import copy_bytes

from .checkpoint import CONFIG, INDEX, Checkpoint, Shard
from .language_model import language_model_config, native_names
from .loadable import check_loadable, check_text_names, is_tied
from .processor import NAMES as PROCESSOR_NAMES
from .safetensors_header import Header, Tensor, header_bytes
from .tensor_names import HEAD, layer_of


@dataclass(frozen=True)
class MadeShard(Shard):
    """A weights file to be made of some tensors of another, which is at `path`.

    Attributes:
        start: its first bytes: the header.
        ranges: the byte ranges of its data in the other file, as first byte and size.
    """

    start: bytes = b""
    ranges: tuple[tuple[int, int], ...] = ()

    def write(self, target: Path, progress: Progress = lambda count: None) -> None:
        """Write the file to `target`, which must not exist.

        Args:
            target: the path.
            progress: called with the number of bytes just copied.

        Raises:
            CheckpointError: the other file cannot be read, or has become shorter.
        """
        with open_to_read(self.path) as reader, target.open("xb", buffering=0) as writer:
            writer.write(self.start)
            for first, size in self.ranges:
                reader.seek(first)
                self._copy(reader, writer, size, progress)

    def _copy(self, reader: FileIO, writer: FileIO, size: int, progress: Progress) -> None:
        if copy_bytes(reader, writer, progress, size) != size:
            raise CheckpointError(f"{self.path} changed while it was read; run the same command again")


def text_checkpoint(base: Checkpoint) -> Checkpoint:
    """The language model of a multimodal base as a checkpoint of its own; it writes nothing.

    Its weights files have the names of the base's. `edited` holds its config and its index.

    Raises:
        CheckpointError: transformers cannot run the language model alone, or tensors of it are missing.
    """
    config = language_model_config(base.config)
    names = native_names(config["model_type"], base.tensors)
    has_head = any(HEAD.search(name) and layer_of(name) is None for name in names.values())
    config["tie_word_embeddings"] = not has_head and is_tied(base.config)  # a head in the weights is never tied
    check_text_names(config["model_type"], names.values())
    check_loadable(config, list(names.values()))
    shards = tuple(filter(None, (_text_shard(shard, names) for shard in base.shards)))
    edited = {CONFIG: (json.dumps(config, indent=2) + "\n").encode()}
    if base.index_name:
        edited[INDEX] = _index(shards)
    kept = tuple(name for name in base.carried if name not in PROCESSOR_NAMES)
    lost = {*base.carried} - {*kept} | {shard.name for shard in base.shards} - {shard.name for shard in shards}
    left_behind = tuple(sorted({*base.left_behind, *lost}))
    return replace(base, config=config, shards=shards, carried=kept, left_behind=left_behind, edited=edited)


def _text_shard(shard: Shard, names: dict[str, str]) -> Shard | None:
    """The part of a shard that is of the language model: the shard itself, a file to be made, or None for nothing."""
    tensors = shard.header.tensors
    if all(names.get(name) == name for name in tensors):
        return shard
    kept = sorted((name for name in tensors if name in names), key=lambda name: tensors[name].start)
    return _made_shard(shard, {names[name]: tensors[name] for name in kept}) if kept else None


def _made_shard(shard: Shard, tensors: dict[str, Tensor]) -> MadeShard:
    start = header_bytes(tensors)
    size = len(start) + sum(tensor.nbytes for tensor in tensors.values())
    header = Header(_moved(tensors, len(start)), hashlib.sha256(start).hexdigest())
    ranges = tuple((tensor.start, tensor.nbytes) for tensor in tensors.values())
    return MadeShard(shard.name, shard.path, size, header, None, start, ranges)


def _moved(tensors: dict[str, Tensor], start: int) -> dict[str, Tensor]:
    """The tensors one behind the other, from the byte `start` on."""
    moved = {}
    for name, tensor in tensors.items():
        moved[name] = replace(tensor, start=start)
        start += tensor.nbytes
    return moved


def _index(shards: Collection[Shard]) -> bytes:
    weight_map = {name: shard.name for shard in shards for name in shard.header.tensors}
    total = sum(tensor.nbytes for shard in shards for tensor in shard.header.tensors.values())
    return json_text({"metadata": {"total_size": total}, "weight_map": weight_map}).encode()
