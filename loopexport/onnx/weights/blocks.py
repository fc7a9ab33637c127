"""A matrix in 4 or 8 bits, block by block, and the arrays that ONNX Runtime's `MatMulNBits` takes.

    weight[row, column] = (code[row, column] - zero_point[row, block]) * scale[row, block]

A block is `block_size` neighbouring columns of one row, so it holds inputs of one output; the last one may be shorter.

Source: ONNX Runtime, `docs/ContribOperators.md`, com.microsoft.MatMulNBits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

_CHUNK_ELEMENTS = 2**24  # elements of a matrix that are quantised at a time, which bounds the memory


@dataclass(frozen=True)
class PackedMatrix:
    """The arrays of a matrix that `MatMulNBits` takes.

    Attributes:
        B: the codes, uint8 `(out, blocks, block_size * bits / 8)`; two codes of 4 bits share a byte, the first one low.
        scales: float32 `(out, blocks)`.
        zero_points: uint8 `(out, ceil(blocks * bits / 8))`, packed like the codes; None for a symmetric matrix.
    """

    B: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None


@dataclass(frozen=True)
class QuantisedMatrix:
    """A matrix `(out, in)` in blocks.

    Attributes:
        bits: 4 or 8.
        block_size: columns that share a scale, one of those that `MatMulNBits` takes.
        codes: uint8 `(out, in)`.
        scales: float32 `(out, blocks)`.
        zero_points: uint8 `(out, blocks)`; None for `2 ** (bits - 1)` everywhere.
    """

    bits: int
    block_size: int
    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None = None

    def dequantise(self) -> np.ndarray:
        """The weights that the codes stand for, float32 `(out, in)`."""
        zeros = 2 ** (self.bits - 1) if self.zero_points is None else self._by_column(self.zero_points)
        return (self.codes.astype(np.float32) - zeros) * self._by_column(self.scales)

    def packed(self) -> PackedMatrix:
        """The arrays that `MatMulNBits` takes. Columns beyond the last get the zero point, so they stand for 0."""
        rows, columns = self.codes.shape
        blocks = self.scales.shape[1]
        filling = np.uint8(2 ** (self.bits - 1)) if self.zero_points is None else self.zero_points[:, -1:]
        codes = np.empty((rows, blocks * self.block_size), np.uint8)
        codes[:, :columns], codes[:, columns:] = self.codes, filling
        zeros = None if self.zero_points is None else _join_nibbles(self.zero_points, self.bits)
        joined = _join_nibbles(codes, self.bits).reshape(rows, blocks, -1)
        return PackedMatrix(joined, np.ascontiguousarray(self.scales), zeros)

    def _by_column(self, values: np.ndarray) -> np.ndarray:
        return np.repeat(values.astype(np.float32), self.block_size, axis=1)[:, : self.codes.shape[1]]


def quantise_matrix(
    weight: np.ndarray,
    bits: int,
    block_size: int,
    symmetric: bool,
    rounding: Callable[[np.ndarray], np.ndarray] = lambda scales: scales,
) -> QuantisedMatrix:
    """Quantise a matrix to the nearest codes.

    Args:
        weight: `(out, in)`.
        bits: 4 or 8.
        block_size: one of those that `MatMulNBits` takes.
        symmetric: without zero points. The number farthest from 0 in a block then gets code 0, so that it is exact.
        rounding: rounds scales to the dtype in which they are stored.
    """
    step = max(1, _CHUNK_ELEMENTS // weight.shape[1])
    parts = [
        _quantise_rows(weight[start : start + step], bits, block_size, symmetric, rounding)
        for start in range(0, weight.shape[0], step)
    ]
    codes, scales, zeros = (None if part[0] is None else np.concatenate(part) for part in zip(*parts, strict=True))
    assert codes is not None
    assert scales is not None
    return QuantisedMatrix(bits, block_size, codes, scales, zeros)


def _quantise_rows(weight: np.ndarray, bits: int, block_size: int, symmetric: bool, rounding):
    """Codes, scales and zero points of some rows."""
    rows, columns = weight.shape
    blocks = -(-columns // block_size)
    padded = np.zeros((rows, blocks * block_size), np.float32)
    padded[:, :columns] = weight
    padded = padded.reshape(rows, blocks, block_size)
    lowest, highest = np.minimum(padded.min(-1), 0), np.maximum(padded.max(-1), 0)
    if symmetric:
        scales, zeros = rounding(_farthest(lowest, highest) / -(2 ** (bits - 1))), None
    else:
        scales = rounding((highest - lowest) / (2**bits - 1))
        zeros = _codes(-lowest, scales, bits)
    offset = 2 ** (bits - 1) if zeros is None else zeros[..., None].astype(np.float32)
    codes = _codes(padded, scales[..., None], bits, offset).reshape(rows, -1)[:, :columns]
    return np.ascontiguousarray(codes), scales, zeros


def _farthest(lowest: np.ndarray, highest: np.ndarray) -> np.ndarray:
    """The number of each block that is farthest from 0, with its sign."""
    return np.where(-lowest > highest, lowest, highest)


def _codes(values: np.ndarray, scales: np.ndarray, bits: int, offset: Any = 0) -> np.ndarray:
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=np.abs(scales) >= np.finfo(np.float32).tiny)
    return np.clip(np.rint(values * inverse + offset), 0, 2**bits - 1).astype(np.uint8)


def _join_nibbles(codes: np.ndarray, bits: int) -> np.ndarray:
    """Two neighbouring codes of 4 bits in one byte, the first one low; codes of 8 bits as they are."""
    if bits == 8:
        return codes
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
    return codes[:, ::2] | (codes[:, 1::2] << 4)
