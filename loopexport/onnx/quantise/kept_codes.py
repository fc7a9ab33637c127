"""Weights of a graph that keep the codes of the checkpoint, alone or stacked as the native model has them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from loopexport.onnx.trace.recipes import Recipe
from loopexport.onnx.weights.blocks import QuantisedMatrix
from loopexport.onnx.weights.source import Weights
from loopexport.onnx.weights.stored_matrices import Layout

# Operators that move rows and change no number. Blocks lie in rows, so they do the same to codes and to scales.
MOVES_ROWS = frozenset(("stack", "cat", "slice", "select", "split", "split_with_sizes", "unsqueeze", "squeeze"))


@dataclass(frozen=True, eq=False)
class StoredSource:
    """A weight in the codes of the checkpoint.

    Attributes:
        recipe: how it is made of stored matrices, none of which it cuts or turns.
        layout: the blocks of all of them.
        scale_dtype: of its scales, the dtype that the graph computes in.
    """

    recipe: Recipe
    layout: Layout
    scale_dtype: torch.dtype

    @property
    def bits(self) -> int:
        """4 or 8."""
        return self.layout.bits

    @property
    def block_size(self) -> int:
        """Columns of a block."""
        return self.layout.block_size

    @property
    def zero_points(self) -> bool:
        """Whether each block has a zero point of its own."""
        return not self.layout.symmetric

    def matrix(self, weights: Weights) -> QuantisedMatrix:
        """The codes, scales and zero points, as one matrix of all rows."""
        parts = {name: weights.quantised(name) for name in self.recipe.names}

        def rows(attribute: str) -> np.ndarray:
            value = self.recipe.evaluate(lambda name: torch.from_numpy(getattr(parts[name], attribute)))
            return np.ascontiguousarray(value.reshape(-1, value.shape[-1]).numpy())

        scales = torch.from_numpy(rows("scales")).to(self.scale_dtype).float().numpy()
        zeros = None if self.layout.symmetric else rows("zero_points")
        return QuantisedMatrix(self.layout.bits, self.layout.block_size, rows("codes"), scales, zeros)


def stored_layout(recipe: Recipe, shape: tuple[int, ...], weights: Weights) -> Layout | None:
    """The blocks of a weight in the codes of the checkpoint; None if it has none, or not in one piece.

    Args:
        recipe: of the weight.
        shape: of the weight, with the inputs last.
        weights: the checkpoint.
    """
    matrices = {name: weights.matrices.get(name) for name in recipe.names}
    layouts = {None if matrix is None else matrix.layout for matrix in matrices.values()}
    layout = layouts.pop() if len(layouts) == 1 else None
    if layout is None or recipe.operators - MOVES_ROWS:
        return None
    shapes = {name: matrix.shape for name, matrix in matrices.items() if matrix is not None}

    def shape_of(width: int) -> tuple[int, ...]:
        read = {
            name: torch.empty(rows, -(-columns // width), device="meta") for name, (rows, columns) in shapes.items()
        }
        return tuple(recipe.evaluate(read.__getitem__).shape)

    *rows, columns = shape
    try:
        is_whole = shape_of(1) == shape and shape_of(layout.block_size) == (*rows, -(-columns // layout.block_size))
    except (RuntimeError, IndexError):  # a slice that codes allow and scales do not
        return None
    return layout if is_whole else None
