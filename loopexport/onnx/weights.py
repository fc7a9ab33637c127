"""The weights of an export, as a graph reads them: by name, one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from loopexport.base.checkpoint import Checkpoint
from loopexport.export.directory import Export

if TYPE_CHECKING:
    import torch

    from loopexport.onnx.quantise.blocks import QuantisedMatrix


class Weights:
    """The tensors of a checkpoint.

    Args:
        checkpoint: the checkpoint.

    Attributes:
        tensors: dtype and shape of each tensor, by name.
    """

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self.tensors: Mapping[str, Any] = checkpoint.tensors

    @cached_property
    def _files(self) -> dict[str, Any]:
        """The open file of each tensor."""
        from safetensors import safe_open

        files: dict[str, Any] = {}
        for shard in self._checkpoint.shards:
            files |= dict.fromkeys(shard.header.tensors, safe_open(shard.path, "pt"))
        return files

    def read(self, name: str) -> torch.Tensor:
        """The values of a tensor."""
        return self._files[name].get_tensor(name)

    def quantised(self, name: str) -> QuantisedMatrix | None:
        """The matrix as the checkpoint quantised it; None if it stores plain numbers."""
        return None


def open_weights(export: Export) -> Weights:
    """The weights of an export."""
    return Weights(export.base)
