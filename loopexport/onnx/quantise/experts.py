"""Sparse experts in 4 bits: one `QMoE` in place of the gathered weights of the chosen experts.

`QMoE` computes in fp32 from the codes, so it is exact, and reads only the experts that it needs. In 8 bits it rounds
activations, and on CUDA it wants the codes in another order; there the experts stay as they are.

Source: ONNX Runtime, `docs/ContribOperators.md`, com.microsoft.QMoE.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from loopexport.onnx.trace.experts import DOMAIN, EXPERTS
from loopexport.onnx.trace.nodes import int_constant, replace_value
from loopexport.onnx.trace.recipes import Recipe
from loopexport.onnx.weights.blocks import QuantisedMatrix
from loopexport.onnx.weights.source import Weights

from .kept_codes import StoredSource
from .matrices import MatrixPart, MatrixSource

BITS = 4

# An expert is down(silu(gate(x)) * up(x)): "swiglu" with a slope of 1 and without an offset, gate and up in turn.
_ATTRIBUTES = {
    "activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0,
    "normalize_routing_weights": 0, "expert_weight_bits": BITS,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class ExpertsSource:
    """The matrices of all experts of a layer, one below the other.

    Attributes:
        source: of all rows.
        rows: of each expert.
        is_gated: whether an expert's rows are a gate and an up projection, which `QMoE` wants in turn.
    """

    source: MatrixSource | StoredSource
    rows: int
    is_gated: bool

    def matrix(self, weights: Weights) -> QuantisedMatrix:
        """The codes of all rows, in the order of `QMoE`."""
        matrix = self.source.matrix(weights)
        if not self.is_gated:
            return matrix
        zeros = matrix.zero_points
        return replace(
            matrix,
            codes=self._in_turn(matrix.codes),
            scales=self._in_turn(matrix.scales),
            zero_points=None if zeros is None else self._in_turn(zeros),
        )

    def _in_turn(self, array: np.ndarray) -> np.ndarray:
        pairs = array.reshape(-1, 2, self.rows // 2, array.shape[-1])
        return np.ascontiguousarray(pairs.transpose(0, 2, 1, 3)).reshape(array.shape)


Choose = Callable[[Recipe, tuple[int, ...]], "MatrixSource | StoredSource"]


def quantise_experts(
    graph: ir.Graph, sources: Mapping[str, Recipe | MatrixPart], choose: Choose
) -> dict[str, Recipe | MatrixPart]:
    """Replace the experts of a traced graph by `QMoE`, in place.

    Args:
        graph: the graph; its weights are inputs.
        sources: what each weight is made of.
        choose: gives what a weight of a recipe and a shape is quantised from.

    Returns:
        What each weight is made of now.
    """
    made = dict(sources)
    for node in [node for node in graph if (node.domain, node.op_type) == (DOMAIN, EXPERTS)]:
        _Experts(graph, node, made, choose).replace()
    return made


class _Experts:
    """The experts of one layer."""

    def __init__(self, graph: ir.Graph, node: ir.Node, made: dict[str, Recipe | MatrixPart], choose: Choose):
        self.graph, self.node, self.made, self.choose = graph, node, made, choose

    def replace(self) -> None:
        """Put `QMoE` in the place of the node."""
        tokens, index, weights, gate_up, down = self.node.inputs
        count = self.node.attributes["k"].as_int()
        codes, scales, zeros, block_size = self._arrays(gate_up, is_gated=True)
        codes_down, scales_down, zeros_down, _ = self._arrays(down, is_gated=False)
        chosen = self._chosen(index, weights, gate_up)
        arrays = [codes, scales, None, codes_down, scales_down, *[None] * 4, zeros, zeros_down, None]
        inputs = [tokens, chosen, *arrays, chosen]
        product = self._add("QMoE", inputs, {**_ATTRIBUTES, "k": count, "block_size": block_size}, "com.microsoft")
        product.type, product.shape = self.node.outputs[0].type, self.node.outputs[0].shape
        replace_value(self.node.outputs[0], product)
        self.graph.remove(self.node, safe=True)
        for weight in (gate_up, down):
            assert weight is not None
            self.graph.inputs.remove(weight)
            del self.made[str(weight.name)]

    def _chosen(self, index, weights, gate_up) -> ir.Value:
        """The weight of each expert for each token, 0 if it was not chosen: `QMoE` then chooses the same ones."""
        name = f"{self.node.name}/experts"
        rows = self._add("Shape", [index], {"start": 0, "end": 1})
        shape = self._add("Concat", [rows, int_constant(self.graph, name, gate_up.shape[0])], {"axis": 0})
        zero = ir.tensor(np.zeros(1, np.float32))
        zeros = self._add("ConstantOfShape", [shape], {"value": zero})
        if weights.dtype != ir.DataType.FLOAT:
            weights = self._add("Cast", [weights], {"to": ir.DataType.FLOAT})
        return self._add("ScatterElements", [zeros, index, weights], {"axis": 1})

    def _arrays(self, weight, is_gated: bool) -> tuple[ir.Value, ir.Value, ir.Value | None, int]:
        """Codes, scales and zero points of a weight, and its block size, as inputs of the graph."""
        name = str(weight.name)
        experts, rows, columns = (int(size) for size in weight.shape)
        recipe = self.made[name]
        assert isinstance(recipe, Recipe)
        source = self.choose(recipe, (experts, rows, columns))
        all_experts = ExpertsSource(source, rows, is_gated)
        blocks = columns // source.block_size

        def array(suffix: str, part: str, dtype: ir.DataType, width: int) -> ir.Value:
            value = ir.Value(name=f"{name}.{suffix}", type=ir.TensorType(dtype), shape=ir.Shape((experts, rows, width)))
            self.made[str(value.name)] = MatrixPart(all_experts, part)
            self.graph.inputs.append(value)
            return value

        zeros = array("zero_points", "zero_points", ir.DataType.UINT8, -(-blocks // 2)) if source.zero_points else None
        codes = array("codes", "B", ir.DataType.UINT8, columns // 2)
        return codes, array("scales", "scales", ir.DataType.FLOAT, blocks), zeros, source.block_size

    def _add(self, operator: str, inputs, attributes, domain: str = "") -> ir.Value:
        name = f"{self.node.name}/{operator}"
        node = ir.node(operator, inputs, attributes, domain=domain, name=name)
        node.outputs[0].name = name
        self.graph.insert_before(self.node, node)
        return node.outputs[0]
