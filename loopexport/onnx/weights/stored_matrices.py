"""Which matrices of a checkpoint are stored quantised, and how: shapes and blocks, from names and headers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from loopexport.errors import OnnxError
from loopexport.export.quantisation import BITS, BLOCK_SIZES, Quantisation

from .stored_scheme import INSTEAD, Scheme, act_order

FLOATS = ("F8_E4M3", "F8_E5M2")
WORD_BITS = 32  # codes are packed into int32
WIDEST = 128  # block of a row with one scale: the widest that ONNX Runtime has CUDA kernels of its own for

# Tensors that belong to a quantised module and are no parameter of the native one.
_BESIDE = (
    "qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_scale_inv", "weight_shape",
    "weight_zero_point", "weight_g_idx", "input_scale", "input_zero_point", "output_scale", "output_zero_point",
    "activation_scale",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """The blocks of a matrix in codes.

    Attributes:
        bits: 4 or 8.
        block_size: columns of a block.
        repeats: how many blocks share a stored scale; 0 for all of a row.
        symmetric: whether there are no zero points to keep.
    """

    bits: int
    block_size: int
    repeats: int
    symmetric: bool


@dataclass(frozen=True)
class StoredMatrix:
    """A quantised matrix of a checkpoint.

    Attributes:
        name: of the weight that it stands for.
        kind: "gptq", "awq", "packed", "int8" or "float".
        shape: `(out, in)`, or `(experts, out, in)` for floats.
        parts: names of its tensors, by what they hold: "codes", "scales", "zeros" and "order".
        layout: its blocks; None for floats.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parts: Mapping[str, str]
    layout: Layout | None = None


def find_matrices(
    scheme: Scheme, tensors: Mapping[str, Any], read: Callable[[str], np.ndarray]
) -> dict[str, StoredMatrix]:
    """The quantised matrices of a checkpoint, by the name of the weight.

    Args:
        scheme: how the checkpoint was quantised.
        tensors: dtype and shape of its tensors, by name.
        read: gives the values of a small tensor.

    Raises:
        OnnxError: a matrix is stored in a way that a graph cannot hold.
    """
    found = list(_matrices(scheme, tensors, read))
    if not found:
        raise OnnxError(
            f"the config says that the base is quantised with {scheme.method}, but no tensor is stored so; "
            "remove quantization_config from base/config.json and config.json if the weights are plain"
        )
    return {matrix.name: matrix for matrix in found}


def companions(matrices: Mapping[str, StoredMatrix]) -> set[str]:
    """Names of the tensors that may lie beside quantised matrices and are no parameters of the native model."""
    prefixes = {name.removesuffix("weight") for name in matrices if name.endswith("weight")}
    beside = {prefix + suffix for prefix in prefixes for suffix in _BESIDE}
    return beside | {part for matrix in matrices.values() for part in matrix.parts.values()}


def stored_quantisation(matrices: Mapping[str, StoredMatrix]) -> Quantisation | None:
    """The quantisation that keeps the codes of a checkpoint, with the layout of most of them; None without codes."""
    counts: Counter[Layout] = Counter()
    for matrix in matrices.values():
        if matrix.layout is not None:
            counts[matrix.layout] += math.prod(matrix.shape)
    if not counts:
        return None
    layout = counts.most_common(1)[0][0]
    return Quantisation(layout.bits, layout.block_size, not layout.symmetric, kept=True)


def stored_warnings(
    scheme: Scheme, matrices: Mapping[str, StoredMatrix], dtype: str, quantisation: Quantisation | None
) -> Iterator[str]:
    """What the user should know before a graph is made of quantised matrices, one line each.

    Args:
        scheme: how the checkpoint was quantised.
        matrices: its quantised matrices.
        dtype: the number format in which the graph computes.
        quantisation: of the graph's weights.
    """
    kept = stored_quantisation(matrices)
    if kept is not None and quantisation is None:
        yield f"the weights of the base are {kept.dtype}, and the graph has them in {dtype}; --dtype as-is keeps them"
    if any(matrix.layout is None for matrix in matrices.values()):
        yield f"the base has weights in fp8, which ONNX Runtime does not multiply by: the graph has them in {dtype}"
    if scheme.rounds_activations:
        yield f"quantised with {scheme.method}, the base may round activations, too; the graph does not"


def _matrices(scheme: Scheme, tensors: Mapping[str, Any], read) -> Iterator[StoredMatrix]:
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind == "qweight":
            yield _int32(scheme, module, tensors, read)
        elif kind == "weight_packed":
            yield _packed(scheme, module, tensors, read)
        elif tensor.dtype == "I8" and f"{name}_scale" in tensors:
            yield _int8(scheme, name, tensors)
        elif tensor.dtype in FLOATS:
            yield _float(scheme, name, tensors)


def _int32(scheme: Scheme, module: str, tensors: Mapping[str, Any], read) -> StoredMatrix:
    """A matrix of GPTQ, whose words hold inputs, or of AWQ, whose words hold outputs."""
    parts = {"codes": "qweight", "zeros": "qzeros", "scales": "scales", "order": "g_idx"}
    parts = {part: f"{module}.{suffix}" for part, suffix in parts.items()}
    if parts["order"] not in tensors:
        del parts["order"]
    codes, zeros, scales = (_shape(tensors, parts[part], 2) for part in ("codes", "zeros", "scales"))
    groups, rows = scales
    bits = WORD_BITS * zeros[1] // rows
    columns = codes[0] * WORD_BITS // bits if scheme.method == "gptq" and bits else codes[0]
    is_whole = codes[1] == rows if scheme.method == "gptq" else codes[1] * WORD_BITS == rows * bits
    is_whole = is_whole and ("order" not in parts or tensors[parts["order"]].shape == (columns,))
    if bits not in BITS.values() or zeros[0] != groups or not is_whole or not groups:
        raise OnnxError(
            f"{module} is stored as qweight {codes}, qzeros {zeros} and scales {scales}, which is no matrix of "
            f"{scheme.method} in {' or '.join(str(each) for each in BITS.values())} bits; {INSTEAD}"
        )
    size = _group_size(module, scheme, columns, groups)
    if "order" in parts and not _is_in_order(read(parts["order"]), size):
        raise act_order(scheme.method, module)
    layout = _layout(module, bits, size, columns, scheme.symmetric)
    return StoredMatrix(f"{module}.weight", scheme.method, (rows, columns), parts, layout)


def _packed(scheme: Scheme, module: str, tensors: Mapping[str, Any], read) -> StoredMatrix:
    """A matrix of compressed-tensors, whose words hold inputs."""
    parts = {"codes": f"{module}.weight_packed", "scales": f"{module}.weight_scale"}
    if f"{module}.weight_g_idx" in tensors:
        raise act_order(scheme.method, module)
    codes = _shape(tensors, parts["codes"], 2)
    rows, columns = (int(size) for size in read(f"{module}.weight_shape"))
    fitting = [bits for bits in BITS.values() if codes == (rows, -(-columns * bits // WORD_BITS))]
    if not fitting:
        raise OnnxError(
            f"{module} is stored as weight_packed {codes} for a weight {(rows, columns)}, which is neither 4 nor 8 "
            f"bits; {INSTEAD}"
        )
    zeros = f"{module}.weight_zero_point"
    if zeros in tensors:
        parts["zeros"] = zeros
    groups = _groups(tensors[parts["scales"]].shape)
    size = _group_size(module, scheme, columns, groups)
    layout = _layout(module, fitting[0], size, columns, zeros not in tensors)
    return StoredMatrix(f"{module}.weight", "packed", (rows, columns), parts, layout)


def _int8(scheme: Scheme, name: str, tensors: Mapping[str, Any]) -> StoredMatrix:
    """A matrix of compressed-tensors with a byte for each code."""
    parts = {"codes": name, "scales": f"{name}_scale"}
    if f"{name}_zero_point" in tensors:
        parts["zeros"] = f"{name}_zero_point"
    rows, columns = _shape(tensors, name, 2)
    size = _group_size(name, scheme, columns, _groups(tensors[parts["scales"]].shape))
    layout = _layout(name, 8, size, columns, "zeros" not in parts)
    return StoredMatrix(name, "int8", (rows, columns), parts, layout)


def _float(scheme: Scheme, name: str, tensors: Mapping[str, Any]) -> StoredMatrix:
    scales = next((each for each in (f"{name}_scale_inv", f"{name}_scale") if each in tensors), None)
    if scales is None:
        raise OnnxError(
            f"{name} is stored as {tensors[name].dtype} without {name}_scale_inv or {name}_scale; {INSTEAD}"
        )
    shape, grid = tensors[name].shape, tensors[scales].shape
    if not _fits(grid, shape, scheme.float_block):
        raise OnnxError(
            f"{scales} has the shape {grid} for a weight {shape}, which are no scales of the whole, of rows, or of "
            f"blocks {scheme.float_block}; {INSTEAD}"
        )
    return StoredMatrix(name, "float", shape, {"codes": name, "scales": scales})


def _fits(grid: tuple[int, ...], shape: tuple[int, ...], block: tuple[int, int] | None) -> bool:
    """Whether scales of a shape are one, one for each row or expert, or one for each block."""
    if len(grid) < 2:
        return grid in ((), (1,), shape[:1])
    counts = [-(-size // each) for size, each in zip(shape[-2:], block or shape[-2:], strict=True)]
    allowed = [{1, size, count} for size, count in zip(shape[-2:], counts, strict=True)]
    is_grid = all(size in each for size, each in zip(grid[-2:], allowed, strict=True))
    return len(grid) == len(shape) and is_grid and grid[:-2] in (shape[:-2], (1,) * (len(shape) - 2))


def _shape(tensors: Mapping[str, Any], name: str, rank: int) -> tuple[int, ...]:
    if name not in tensors:
        raise OnnxError(f"the checkpoint has no tensor {name}, which its quantisation needs; download it again")
    shape = tensors[name].shape
    if len(shape) != rank:
        raise OnnxError(f"{name} has the shape {shape}, and a graph takes quantised matrices alone; {INSTEAD}")
    return shape


def _groups(shape: tuple[int, ...]) -> int:
    """Scales of each row: `(rows, groups)`, or one scale for each row or for all."""
    return shape[1] if len(shape) == 2 else 1


def _group_size(module: str, scheme: Scheme, columns: int, groups: int) -> int:
    """Columns that share a scale. The config may name one size for many modules of several."""
    if groups == 1:
        return columns
    if scheme.group_size and -(-columns // scheme.group_size) == groups:
        return scheme.group_size
    if columns % groups:
        raise OnnxError(f"{module} has {groups} scales for {columns} columns, which are no equal groups; {INSTEAD}")
    return columns // groups


def _is_in_order(order: np.ndarray, size: int) -> bool:
    return bool((order == np.arange(len(order)) // size).all())


def _layout(module: str, bits: int, size: int, columns: int, symmetric: bool) -> Layout:
    if size >= columns:
        fitting = [block for block in BLOCK_SIZES if block <= WIDEST and columns % block == 0]
        return Layout(bits, max(fitting, default=min(BLOCK_SIZES)), 0, symmetric)
    fitting = [block for block in BLOCK_SIZES if size % block == 0]
    if not fitting:
        raise OnnxError(
            f"{module} has a scale for every {size} columns, and a graph takes multiples of {min(BLOCK_SIZES)}; "
            f"{INSTEAD}"
        )
    return Layout(bits, max(fitting), size // max(fitting), symmetric)
