"""Trace an update rule from the export's own code into a small graph, in which each run of a layer is one node."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from loopexport.loop.spec import LoopSpec
from loopexport.onnx.trace.marks import MARKS, RUN_LAYER
from loopexport.onnx.trace.simplify import optimise
from loopexport.onnx.trace.tracer import BATCH, SEQUENCE
from loopexport.onnx.trace.translate import translate
from loopexport.templates.looped_body import Body
from loopexport.templates.looped_path import BodySpec
from loopexport.templates.looped_rules import run_loop


def rule_graph(spec: LoopSpec, body: BodySpec, hidden_size: int, dtype: torch.dtype) -> ir.Graph:
    """The loop around one loop body, as a function of the body's input and of each layer's natural output.

    All values are `(batch, seq, hidden_size)`.

    Args:
        spec: the loop.
        body: what loops; which layers it has does not matter here.
        hidden_size, dtype: of the hidden states.
    """
    damping = spec.damping if spec.path is None else body.step_size
    alone = replace(spec, span=(0, 1), path=None, steps=body.steps, damping=damping, decode="full", first_n=0)
    return _traced(alone, len(body.layers), hidden_size, dtype)


@lru_cache(maxsize=32)
def _traced(spec: LoopSpec, width: int, hidden_size: int, dtype: torch.dtype) -> ir.Graph:
    values = [torch.zeros(BATCH, SEQUENCE, hidden_size, dtype=dtype) for _ in range(width + 1)]
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    sizes = [{0: batch, 1: sequence} for _ in values]
    with torch.no_grad(), _RuleSubstitutes():
        program = torch.export.export(_Loop(spec), (values,), dynamic_shapes={"values": sizes}, strict=False)
        model = translate(program)
    optimise(model)
    return model.graph


class _Loop(nn.Module):
    """The loop as a module that torch can trace."""

    def __init__(self, spec: LoopSpec):
        super().__init__()
        self.spec = spec

    def forward(self, values: list[torch.Tensor]):
        """The loop's output, from the body's input and each layer's natural output."""
        return run_loop(values[0], _TracedBody(values[1:], self.spec.bodies[0]), self.spec)


class _TracedBody:
    """g as one node for each layer; `run_loop` calls it like `looped_body.Body`.

    Args:
        natural_outputs: the output of each layer in the natural pass.
        body: K and s.
    """

    norm, rescale, placed = staticmethod(Body.norm), staticmethod(Body.rescale), Body.placed

    def __init__(self, natural_outputs: list[torch.Tensor], body: BodySpec):
        self.steps, self.step_size = body.steps, body.step_size
        self.natural_outputs = natural_outputs
        self.natural = natural_outputs[-1]
        self.has_begun = False

    def __call__(self, hidden, replace=None):
        if not self.has_begun:
            self.has_begun = True
            return self.natural
        for position in range(len(self.natural_outputs)):
            attributes: dict[str, Any] = {"position": position}
            hidden = torch.onnx.ops.symbolic(
                f"{MARKS}::{RUN_LAYER}", (hidden,), attributes, dtype=hidden.dtype, shape=hidden.shape, version=1
            )
            hidden = hidden if replace is None else replace(position, hidden)
        return hidden


class _RuleSubstitutes(TorchFunctionMode):
    """While active, replaces the torch functions of rule anderson that a graph cannot express.

    ONNX cannot solve linear equations, so the rule's few equations are solved by elimination. Their matrix is symmetric
    and positive definite, so elimination needs no pivots.
    ONNX Runtime (1.32) miscompiles the product of a transposed matrix with another one (MatmulTransposeFusion), so
    these small matrices are multiplied and summed.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.linalg.solve:
            return _eliminate(*args)
        if func in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__):
            return _multiply_and_sum(*args)
        return func(*args, **(kwargs or {}))


def _multiply_and_sum(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left @ right` for `(n, m)` and `(m, k)` or `(m,)`."""
    if right.dim() == 1:
        return (left * right).sum(-1)
    return (left.unsqueeze(-1) * right.unsqueeze(0)).sum(-2)


def _eliminate(matrix: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Solve `matrix @ x = target` for `(n, n)` and `(n,)` by Gauss-Jordan elimination."""
    size = matrix.shape[0]
    rows = [torch.cat([matrix[i], target[i : i + 1]]) for i in range(size)]
    for i in range(size):
        rows[i] = rows[i] / rows[i][i]
        for j in range(size):
            if j != i:
                rows[j] = rows[j] - rows[j][i] * rows[i]
    return torch.stack([row[-1] for row in rows])
