"""The header of a `.safetensors` file: tensor names, dtypes, shapes and extents, without touching the data.

Read here rather than through the safetensors library because a plan needs the header's digest and exact end, and must
stay cheap: no numpy, no memory map, whatever the size of the file.

Source: the format's description, github.com/huggingface/safetensors (8 bytes little-endian length, JSON, data).
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

from .errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the safetensors library refuses longer ones

# Bits of one element; sub-byte types exist.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
    "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """One tensor's entry.

    Attributes:
        dtype: as in the format, such as `BF16`.
        shape: its sizes.
        nbytes: how many bytes it takes in the file.
        start: where in the file they begin; 0 where the header was not read from a file.
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
    """A shard's header: `tensors` by name, and the sha256 of the header's own bytes, length prefix included."""

    tensors: dict[str, Tensor]
    sha256: str


def read_header(path: Path) -> Header:
    """Read and check the header of one shard.

    Raises:
        CheckpointError: the file is not safetensors, or is shorter or longer than its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(f"{path.name} is not a whole safetensors file ({size} bytes); download it again")
        raw = file.read(length)
    try:
        entries = json.loads(raw)
        entries.pop("__metadata__", None)
        tensors = {name: _tensor(entry, 8 + length) for name, entry in entries.items()}
        ends = [entry["data_offsets"][1] for entry in entries.values()]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise CheckpointError(f"{path.name} has no readable safetensors header; download it again") from None
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise CheckpointError(
            f"{path.name} has {size} bytes where its header promises {expected}; it is damaged, download it again"
        )
    return Header(tensors, hashlib.sha256(prefix + raw).hexdigest())


def _tensor(entry: dict, data_start: int) -> Tensor:
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, start, end)) or end < start:
        raise ValueError("not an extent")
    tensor = Tensor(str(entry["dtype"]), shape, end - start, data_start + start)
    bits = DTYPE_BITS.get(tensor.dtype)  # a dtype newer than this table is passed through unchecked
    if bits is not None and (tensor.num_elements * bits + 7) // 8 != tensor.nbytes:
        raise ValueError("extent and shape differ")
    return tensor
