"""The header of a `.safetensors` file: tensor names, dtypes, shapes and byte ranges, without reading the data.

This module does not use the safetensors library, because a plan needs the header's digest and its exact end, and must
stay cheap for files of any size: no numpy, no memory map.

Source: the format's description, github.com/huggingface/safetensors (8 bytes little-endian length, JSON, data).
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from loopexport.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library

# Bits per element; some types are smaller than a byte.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
    "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file.

    Attributes:
        dtype: its name in the format, such as `BF16`.
        shape: its sizes.
        nbytes: its size in the file, in bytes.
        start: offset of its first byte in the file; 0 if the header came from the Hub.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    start: int = 0

    @property
    def num_elements(self) -> int:
        """Number of elements, 1 for a scalar."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A shard's header: its tensors by name, and the sha256 of the header's bytes, length prefix included."""

    tensors: dict[str, Tensor]
    sha256: str


def read_header(path: Path) -> Header:
    """Read and check the header of one shard.

    Raises:
        CheckpointError: the file cannot be read, is not safetensors, or does not have the size that its header gives.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(f"{path.name} is not a whole safetensors file ({size} bytes); download it again")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    try:
        tensors, data_bytes = _parse(raw.decode("utf-8"), data_start=8 + length)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path.name} has no readable safetensors header; download it again") from None
    expected = 8 + length + data_bytes
    if size != expected:
        raise CheckpointError(
            f"{path.name} has {size} bytes but its header says {expected}; it is damaged, download it again"
        )
    return Header(tensors, hashlib.sha256(prefix + raw).hexdigest())


def header_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The header of a file with these tensors one behind the other, length prefix included."""
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # the data begins at a multiple of 8
    return len(raw).to_bytes(8, "little") + raw


def _parse(text: str, data_start: int) -> tuple[dict[str, Tensor], int]:
    """The tensors by name, and the size of their data in bytes, which they must fill without gaps or overlaps."""
    if not text.startswith("{"):
        raise ValueError("not an object")
    entries = json.loads(text)
    _check_metadata(entries.pop("__metadata__", None))
    tensors = {_text(name): _tensor(entry, data_start) for name, entry in entries.items()}
    filled = 0
    for start, end in sorted(entry["data_offsets"] for entry in entries.values()):
        if start != filled:
            raise ValueError("a gap or an overlap")
        filled = end
    return tensors, filled


def _check_metadata(metadata: dict | None) -> None:
    for key, value in ({} if metadata is None else metadata).items():
        _text(key)
        _text(value)


def _text(value) -> str:
    """Check that a value is valid Unicode text: JSON escapes can spell half a character, which other readers refuse."""
    if not isinstance(value, str):
        raise TypeError("not a string")
    value.encode()
    return value


def _tensor(entry: dict, data_start: int) -> Tensor:
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    sizes = (*shape, *accumulate(shape, operator.mul), start, end)
    if not all(type(size) is int and 0 <= size < 2**64 for size in sizes) or end < start:
        raise ValueError("not a byte range")
    tensor = Tensor(_text(entry["dtype"]), shape, end - start, data_start + start)
    bits = DTYPE_BITS.get(tensor.dtype)
    if bits is None:  # a dtype newer than this table passes if each element has at least one bit
        if tensor.num_elements > 8 * tensor.nbytes:
            raise ValueError("more elements than bits")
    elif tensor.num_elements * bits != 8 * tensor.nbytes:
        raise ValueError("byte range and shape do not agree")
    return tensor
