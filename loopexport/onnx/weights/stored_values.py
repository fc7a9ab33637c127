"""The values of quantised matrices of a checkpoint: codes, scales and zero points as they are, and floats times scales.

Sources: the packing code of AutoGPTQ and GPTQModel (`checkpoint_format`), AutoAWQ ("gemm"), compressed-tensors
(`pack_to_int32`), and DeepSeek-V3's `weight_dequant`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from loopexport.errors import OnnxError

from .blocks import QuantisedMatrix
from .stored_matrices import Layout, StoredMatrix
from .stored_scheme import INSTEAD, Scheme

if TYPE_CHECKING:
    import torch

    Read = Callable[[str], torch.Tensor]

# Where AWQ keeps outputs 0 to 7 of a word: output 1 has bits 16 to 19.
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


def read_codes(matrix: StoredMatrix, scheme: Scheme, read: Read) -> QuantisedMatrix:
    """A matrix in codes, bit for bit as it is stored.

    Raises:
        OnnxError: it has zero points, and the config says that it has none.
    """
    layout = matrix.layout
    assert layout is not None
    codes, zeros = _stored(matrix, scheme, layout.bits, read)
    if zeros is not None and layout.symmetric and (zeros != 2 ** (layout.bits - 1)).any():
        raise OnnxError(
            f"{matrix.name} has zero points, and the config says that it is symmetric; set sym to false in the "
            f"quantization_config of config.json and base/config.json if the zero points count, or {INSTEAD}"
        )
    scales = _array(read(matrix.parts["scales"]))
    if matrix.kind in ("gptq", "awq"):
        scales = scales.T
    kept = None if zeros is None or layout.symmetric else _by_block(zeros, layout, matrix.shape)
    codes = np.ascontiguousarray(codes)
    return QuantisedMatrix(layout.bits, layout.block_size, codes, _by_block(scales, layout, matrix.shape), kept)


def read_floats(matrix: StoredMatrix, scheme: Scheme, read: Read) -> torch.Tensor:
    """A matrix of floats in 8 bits, times its scales, in fp32."""
    import torch

    values, scales = (read(matrix.parts[part]).to(torch.float32) for part in ("codes", "scales"))
    if scales.dim() < values.dim():  # one scale, or one for each row or expert
        scales = scales.reshape(-1, *[1] * (values.dim() - 1))
    for axis, size in zip((-2, -1), scheme.float_block or (1, 1), strict=True):
        if 1 < scales.shape[axis] < values.shape[axis]:
            scales = scales.repeat_interleave(size, axis).narrow(axis, 0, values.shape[axis])
    return values * scales


def _stored(matrix: StoredMatrix, scheme: Scheme, bits: int, read: Read) -> tuple[np.ndarray, np.ndarray | None]:
    """Codes `(out, in)`, and zero points of each group, row or matrix, all without a sign."""
    if matrix.kind == "gptq":
        return _gptq(matrix, bits, read, scheme.zeros_one_less)
    return {"awq": _awq, "packed": _packed, "int8": _int8}[matrix.kind](matrix, bits, read)


def _gptq(matrix: StoredMatrix, bits: int, read: Read, one_less: bool) -> tuple[np.ndarray, np.ndarray]:
    codes, zeros = (_array(read(matrix.parts[part])) for part in ("codes", "zeros"))
    if one_less:  # in whole words, as GPTQModel does: a zero point of 0 has borrowed from the next one
        zeros = (zeros.view(np.uint32) + np.uint32(sum(1 << place for place in range(0, 32, bits)))).view(np.int32)
    return _unpacked(codes.T, bits), _unpacked(zeros, bits).T


def _awq(matrix: StoredMatrix, bits: int, read: Read) -> tuple[np.ndarray, np.ndarray]:
    codes, zeros = (_array(read(matrix.parts[part])) for part in ("codes", "zeros"))
    return _in_place(_unpacked(codes, bits)).T, _in_place(_unpacked(zeros, bits)).T


def _in_place(codes: np.ndarray) -> np.ndarray:
    return codes.reshape(len(codes), -1, 8)[:, :, AWQ_PLACES].reshape(len(codes), -1)


def _packed(matrix: StoredMatrix, bits: int, read: Read) -> tuple[np.ndarray, np.ndarray | None]:
    rows, columns = matrix.shape
    codes = _unpacked(_array(read(matrix.parts["codes"])), bits)[:, :columns]
    zeros = _zeros(matrix, read)
    if zeros is not None and zeros.dtype == np.int32:
        return codes, _unpacked(zeros.T, bits)[:, :rows].T
    return codes, None if zeros is None else _from_signed(zeros, bits)


def _int8(matrix: StoredMatrix, bits: int, read: Read) -> tuple[np.ndarray, np.ndarray | None]:
    zeros = _zeros(matrix, read)
    codes = _from_signed(_array(read(matrix.parts["codes"])), bits)
    return codes, None if zeros is None else _from_signed(zeros, bits)


def _zeros(matrix: StoredMatrix, read: Read) -> np.ndarray | None:
    return _array(read(matrix.parts["zeros"])) if "zeros" in matrix.parts else None


def _unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """The codes of each row of words, the lowest bits first."""
    parts = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    return parts if bits == 8 else np.stack([parts & 15, parts >> 4], -1).reshape(len(parts), -1)


def _from_signed(values: np.ndarray, bits: int) -> np.ndarray:
    return (values.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)


def _by_block(values: np.ndarray, layout: Layout, shape: tuple[int, ...]) -> np.ndarray:
    """Scales or zero points of each block, `(out, blocks)`, from those of each group, row or matrix."""
    rows, columns = shape
    blocks = -(-columns // layout.block_size)
    values = values if values.ndim == 2 else values.reshape(-1, 1)
    values = np.broadcast_to(values, (rows, values.shape[1]))
    return np.ascontiguousarray(np.repeat(values, layout.repeats or blocks, axis=1)[:, :blocks])


def _array(tensor: torch.Tensor) -> np.ndarray:
    """The values as numpy has them; it has no bf16."""
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
