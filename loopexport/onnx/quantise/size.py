"""How many bytes the weights take, from the checkpoint's header alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from loopexport.base.tensor_names import EMBEDDING, HEAD, is_tower, layer_of
from loopexport.errors import OnnxError
from loopexport.export.quantisation import HEAD_BITS, Quantisation
from loopexport.onnx.weights.source import Weights

from .sensitive import is_sensitive

MIN_ROWS = 32  # matrices with fewer outputs stay as they are
ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}

_EXPERTS = re.compile(r"\.experts\b")
_ROUTER = re.compile(r"\.(gate|router|router_gate)(\.(wg|layer|classifier))?\.weight$")


def weight_bytes(
    weights: Weights,
    dtype: str,
    quantisation: Quantisation | None,
    names: Iterable[str] | None = None,
    whole_experts: bool = False,
) -> int:
    """Bytes of weights in a data file, without padding.

    This goes by names. The graph goes by what its nodes do, so a family with unusual names may differ a little.

    Args:
        weights: the tensors of the checkpoint.
        dtype: of the weights that are not quantised.
        quantisation: of the others; None if there are none.
        names: of the tensors to count; None for all of the language model.
        whole_experts: whether sparse experts are quantised, too.
    """
    tensors = weights.tensors
    chosen = [name for name in tensors if not is_tower(name)] if names is None else names
    return sum(_bytes(weights, name, dtype, quantisation, whole_experts) for name in chosen)


def check_quantises(weights: Weights, quantisation: Quantisation, whole_experts: bool) -> None:
    """Check that a quantisation changes some weight.

    Raises:
        OnnxError: all matrices are too small for it.
    """
    names = (name for name in weights.tensors if not is_tower(name))
    if not quantisation.kept and not any(_layout(weights, name, quantisation, whole_experts) for name in names):
        raise OnnxError(
            f"no matrix of the base has {MIN_ROWS} outputs and a whole block of {quantisation.block_size} inputs, so "
            "nothing would be quantised; use a smaller --block-size, or --dtype fp16"
        )


def expert_arrays(weights: Weights) -> list[str]:
    """Names of the stored tensors of sparse experts."""
    return [name for name in weights.tensors if _EXPERTS.search(name) and not is_tower(name)]


def _bytes(weights: Weights, name: str, dtype: str, quantisation: Quantisation | None, whole_experts: bool) -> int:
    tensor = weights.tensors[name]
    layout = None if quantisation is None else _layout(weights, name, quantisation, whole_experts)
    if layout is None:
        return tensor.num_elements * ITEM_BYTES[dtype]
    bits, block_size, has_zeros = layout
    *rows, columns = tensor.shape
    blocks = -(-columns // block_size)
    codes = blocks * block_size * bits // 8
    zeros = -(-blocks * bits // 8) if has_zeros else 0
    return math.prod(rows) * (codes + blocks * ITEM_BYTES[dtype] + zeros)


def _layout(
    weights: Weights, name: str, quantisation: Quantisation, whole_experts: bool
) -> tuple[int, int, bool] | None:
    """Bits and block size of a quantised matrix, and whether it has zero points; None for a tensor that stays."""
    if _EXPERTS.search(name) and not whole_experts:
        return None
    if quantisation.kept:
        matrix = weights.matrices.get(name)
        stored = None if matrix is None else matrix.layout
        return None if stored is None else (stored.bits, stored.block_size, not stored.symmetric)
    bits = _bits(weights, name, quantisation)
    return None if bits is None else (bits, quantisation.block_size, quantisation.zero_points)


def _bits(weights: Weights, name: str, quantisation: Quantisation) -> int | None:
    """Bits of a matrix that is quantised here; None for a tensor that stays."""
    shape = weights.tensors[name].shape
    if _EXPERTS.search(name) and len(shape) > 1:
        return quantisation.bits
    if len(shape) != 2 or shape[0] < MIN_ROWS or shape[1] < quantisation.block_size:
        return None
    if _is_head(weights, name):
        return HEAD_BITS if quantisation.head else None
    if layer_of(name) is None or _ROUTER.search(name):
        return None
    return HEAD_BITS if is_sensitive(name, weights.num_layers, quantisation) else quantisation.bits


def _is_head(weights: Weights, name: str) -> bool:
    """Whether a tensor is the head, or the embedding in a checkpoint that stores no head of its own."""
    if HEAD.search(name):
        return True
    return bool(EMBEDDING.search(name)) and not any(map(HEAD.search, weights.tensors))
