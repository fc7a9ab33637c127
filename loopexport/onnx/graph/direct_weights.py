"""Weights that are stored as the graph multiplies by them, so that they are direct operands of its products.

A checkpoint stores a linear layer as `(out, in)`, and a trace multiplies by its transpose. A data file of ours can hold
the transpose itself. Quantisers of other tools then find the weights, and ONNX Runtime transposes nothing when it makes
a session.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import torch

from loopexport.onnx.trace.recipes import Recipe


def use_weights_directly(graph: ir.Graph, recipes: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """Turn each weight that is only read transposed into its transpose, in place.

    Returns:
        The recipes of all weights; those that changed now make the transpose.
    """
    made = dict(recipes)
    for weight in list(graph.inputs):
        name = str(weight.name)
        if name in recipes and _is_only_transposed(weight):
            made[name] = Recipe(None, torch.ops.aten.transpose.int, (recipes[name], 0, 1), rank=2)
            _drop_transposes(graph, weight)
    return made


def _is_only_transposed(weight: ir.Value) -> bool:
    nodes = [use.node for use in weight.uses()]
    return bool(nodes) and all(
        node.op_type == "Transpose" and list(node.attributes.get_ints("perm")) == [1, 0] for node in nodes
    )


def _drop_transposes(graph: ir.Graph, weight: ir.Value) -> None:
    for node in [use.node for use in weight.uses()]:
        node.outputs[0].replace_all_uses_with(weight)
        graph.remove(node, safe=True)
    assert weight.shape is not None
    weight.shape = ir.Shape(reversed(weight.shape.dims))
