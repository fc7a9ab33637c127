"""The weights of an export, as a graph reads them: by name, one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from loopexport.base.checkpoint import Checkpoint
from loopexport.base.safetensors_header import Tensor
from loopexport.export.directory import Export

from .stored_matrices import StoredMatrix, companions, find_matrices
from .stored_scheme import Scheme, read_scheme

if TYPE_CHECKING:
    import torch

    from loopexport.onnx.weights.blocks import QuantisedMatrix


class Weights:
    """The tensors of a checkpoint. A matrix that is stored quantised is one tensor in fp32.

    Args:
        checkpoint: the checkpoint.

    Attributes:
        tensors: dtype and shape of each tensor, by name.
        scheme: how the checkpoint was quantised; None for plain weights.
        matrices: how each quantised matrix is stored, by the name of the weight.

    Raises:
        OnnxError: the checkpoint was quantised in a way that a graph cannot hold.
    """

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self.tensors: Mapping[str, Any] = checkpoint.tensors
        self.scheme: Scheme | None = read_scheme(checkpoint)
        self.matrices: dict[str, StoredMatrix] = {}
        if self.scheme is not None:
            self.matrices = find_matrices(self.scheme, checkpoint.tensors, lambda name: self._stored(name).numpy())
            beside = companions(self.matrices)
            plain = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in beside}
            self.tensors = plain | {name: _plain(matrix) for name, matrix in self.matrices.items()}

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self._checkpoint.num_layers

    @cached_property
    def _files(self) -> dict[str, Any]:
        """The open file of each tensor."""
        from safetensors import safe_open

        files: dict[str, Any] = {}
        for shard in self._checkpoint.shards:
            files |= dict.fromkeys(shard.header.tensors, safe_open(shard.path, "pt"))
        return files

    def _stored(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(name)

    def read(self, name: str) -> torch.Tensor:
        """The values of a tensor; those of a quantised matrix are what its codes and scales stand for."""
        import torch

        if name not in self.matrices:
            return self._stored(name)
        matrix = self.quantised(name)
        return self._floats(name) if matrix is None else torch.from_numpy(matrix.dequantise())

    def quantised(self, name: str) -> QuantisedMatrix | None:
        """The matrix in the codes of the checkpoint; None if it stores plain numbers or floats in 8 bits."""
        from .stored_values import read_codes

        matrix = self.matrices.get(name)
        if matrix is None or matrix.layout is None:
            return None
        assert self.scheme is not None
        return read_codes(matrix, self.scheme, self._stored)

    def _floats(self, name: str) -> torch.Tensor:
        from .stored_values import read_floats

        assert self.scheme is not None
        return read_floats(self.matrices[name], self.scheme, self._stored)


def open_weights(export: Export) -> Weights:
    """The weights of an export.

    Raises:
        OnnxError: the base was quantised in a way that a graph cannot hold.
    """
    return Weights(export.base)


def _plain(matrix: StoredMatrix) -> Tensor:
    tensor = Tensor("F32", matrix.shape, 0)
    return Tensor("F32", matrix.shape, 4 * tensor.num_elements)
