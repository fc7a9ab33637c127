"""Which matrix of a checkpoint becomes which quantised arrays, one matrix in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from loopexport.onnx.trace.recipes import Recipe
from loopexport.onnx.weights.blocks import QuantisedMatrix, quantise_matrix
from loopexport.onnx.weights.source import Weights

if TYPE_CHECKING:
    from loopexport.onnx.weights.blocks import PackedMatrix


def uncast(recipe: Recipe) -> Recipe:
    """The recipe without the last conversion to another dtype: what is quantised is the number as it is stored."""
    is_cast = recipe.stored is None and recipe.function is torch.ops.aten._to_copy.default
    return uncast(recipe.args[0]) if is_cast else recipe


@dataclass(frozen=True, eq=False)
class MatrixSource:
    """A weight that is stored quantised.

    Attributes:
        recipe: how it is made of stored tensors.
        is_out_first: whether it is `(out, in)`, as in a linear layer, and not `(in, out)`, as in GPT-2.
        bits, block_size, zero_points: how to quantise it.
        scale_dtype: of its scales, the dtype that the graph computes in.
    """

    recipe: Recipe
    is_out_first: bool
    bits: int
    block_size: int
    zero_points: bool
    scale_dtype: torch.dtype

    def matrix(self, weights: Weights) -> QuantisedMatrix:
        """The quantised matrix."""
        return self.quantise(self.recipe.evaluate(weights.read))

    def quantise(self, weight: torch.Tensor) -> QuantisedMatrix:
        """Quantise the weight's values."""
        rows = weight if self.is_out_first else weight.T
        return quantise_matrix(
            rows.reshape(-1, rows.shape[-1]).float().numpy(),
            self.bits,
            self.block_size,
            not self.zero_points,
            rounding=self._rounded,
        )

    def _rounded(self, scales: np.ndarray) -> np.ndarray:
        return torch.from_numpy(scales).to(self.scale_dtype).float().numpy()


class HasMatrix(Protocol):
    """Something that a quantised weight is made of."""

    def matrix(self, weights: Weights) -> QuantisedMatrix:
        """The quantised matrix."""
        ...


@dataclass(frozen=True)
class MatrixPart:
    """One of the arrays of a quantised weight.

    Attributes:
        source: the weight.
        name: the attribute of `PackedMatrix`.
    """

    source: HasMatrix
    name: str


@dataclass
class SourceReader:
    """Reads what a graph's weights are made of; the parts of one matrix in turn quantise it once."""

    weights: Weights
    _last: tuple[HasMatrix, PackedMatrix] | None = field(default=None, init=False)

    def read(self, source: Recipe | MatrixPart) -> torch.Tensor:
        """The values of a weight, or of one array of it."""
        if isinstance(source, Recipe):
            return source.evaluate(self.weights.read)
        if self._last is None or self._last[0] is not source.source:
            self._last = None  # frees the matrix before the next one is read
            self._last = source.source, source.source.matrix(self.weights).packed()
        return torch.from_numpy(getattr(self._last[1], source.name))
