"""How many bytes the weights take, from the checkpoint's header alone."""

from __future__ import annotations

import re
from collections.abc import Iterable

from loopexport.base.checkpoint import Checkpoint
from loopexport.base.safetensors_header import Tensor
from loopexport.base.tensor_names import EMBEDDING, HEAD, is_tower, layer_of
from loopexport.export.quantisation import HEAD_BITS, Quantisation

from .sensitive import is_sensitive

MIN_ROWS = 32  # matrices with fewer outputs stay as they are
ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}

_EXPERTS = re.compile(r"\.experts\b")
_ROUTER = re.compile(r"\.(gate|router|router_gate)(\.(wg|layer|classifier))?\.weight$")


def weight_bytes(
    checkpoint: Checkpoint, dtype: str, quantisation: Quantisation | None, names: Iterable[str] | None = None
) -> int:
    """Bytes of weights in a data file, without padding.

    This goes by names. The graph goes by what its nodes do, so a family with unusual names may differ a little.

    Args:
        checkpoint: the checkpoint.
        dtype: of the weights that are not quantised.
        quantisation: of the others; None if there are none.
        names: of the tensors to count; None for all of the language model.
    """
    tensors = checkpoint.tensors
    chosen = [name for name in tensors if not is_tower(name)] if names is None else names
    return sum(_bytes(checkpoint, name, tensors[name], dtype, quantisation) for name in chosen)


def expert_arrays(checkpoint: Checkpoint) -> list[str]:
    """Names of the stored tensors of sparse experts."""
    return [name for name in checkpoint.tensors if _EXPERTS.search(name) and not is_tower(name)]


def _bytes(checkpoint: Checkpoint, name: str, tensor: Tensor, dtype: str, quantisation: Quantisation | None) -> int:
    bits = None if quantisation is None else _bits(checkpoint, name, tensor, quantisation)
    if bits is None or quantisation is None:
        return tensor.num_elements * ITEM_BYTES[dtype]
    rows, columns = tensor.shape
    blocks = -(-columns // quantisation.block_size)
    codes = blocks * quantisation.block_size * bits // 8
    zeros = -(-blocks * bits // 8) if quantisation.zero_points else 0
    return rows * (codes + blocks * ITEM_BYTES[dtype] + zeros)


def _bits(checkpoint: Checkpoint, name: str, tensor: Tensor, quantisation: Quantisation) -> int | None:
    """Bits of a quantised matrix; None for a tensor that stays."""
    if len(tensor.shape) != 2 or tensor.shape[0] < MIN_ROWS or tensor.shape[1] < quantisation.block_size:
        return None
    if _is_head(checkpoint, name):
        return HEAD_BITS if quantisation.head else None
    if layer_of(name) is None or _EXPERTS.search(name) or _ROUTER.search(name):
        return None
    return HEAD_BITS if is_sensitive(name, checkpoint.num_layers, quantisation) else quantisation.bits


def _is_head(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor is the head, or the embedding in a checkpoint that stores no head of its own."""
    if HEAD.search(name):
        return True
    return bool(EMBEDDING.search(name)) and not any(map(HEAD.search, checkpoint.tensors))
