"""Make a fresh trace small and readable before it is unrolled: each node in the span is copied for every iteration."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from .nodes import int_constant
from .recipes import Recipe

_WRAPPER = "model."  # the name of the native model inside the traced module


def simplify(model: ir.Model, recipes: Mapping[str, Recipe]) -> None:
    """Fold constants, keep one copy of each weight, and name every node after its module, in place.

    Weights become inputs with the names of the model's parameters: the optimiser cannot fold inputs, and
    `bind_weights` binds them later.
    """
    _make_weights_inputs(model.graph, recipes)
    _merge_tied_weights(model.graph, recipes)
    optimise(model)
    _multiply_tied_heads(model.graph, recipes)
    _name_nodes(model.graph)
    _name_free_sizes(model.graph)
    _remove_trace_metadata(model)


def optimise(model: ir.Model) -> None:
    """Run onnxscript's optimiser in place; do not fold constants that are merely close to 0 or 1.

    It compares with a tolerance, and so would drop `x + 1e-8`, the epsilon of some families, and `x * 1.00001`.
    """
    from onnxscript.optimizer import optimize_ir

    hidden = _hide_near_neutral(model.graph)
    optimize_ir(model, onnx_shape_inference=False)
    for value, tensor in hidden:
        model.graph.inputs.remove(value)
        value.const_value = tensor
        model.graph.register_initializer(value)


def _hide_near_neutral(graph: ir.Graph) -> list[tuple[ir.Value, ir.TensorProtocol]]:
    """Turn constants close to 0 or 1 into inputs, in place.

    Returns:
        Each new input and its number.
    """
    constants = [node.outputs[0] for node in graph if node.op_type == "Constant"]
    hidden = []
    for value in [*graph.initializers.values(), *constants]:
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is None or not _is_near_neutral(tensor):
            continue
        node = value.producer()
        replacement = ir.Value(name=value.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()))
        value.replace_all_uses_with(replacement)
        if node is None:
            del graph.initializers[str(value.name)]
        else:
            graph.remove(node, safe=True)
        graph.inputs.append(replacement)
        hidden.append((replacement, tensor))
    return hidden


def _is_near_neutral(tensor: ir.TensorProtocol) -> bool:
    if tensor.size != 1 or not tensor.dtype.is_floating_point():
        return False
    number = float(tensor.numpy().reshape(-1)[0])
    return any(number != neutral and math.isclose(number, neutral, rel_tol=1e-4, abs_tol=1e-7) for neutral in (0, 1))


def _make_weights_inputs(graph: ir.Graph, recipes: Mapping[str, Recipe]) -> None:
    for name, value in list(graph.initializers.items()):
        parameter = name.removeprefix(_WRAPPER)
        if parameter in recipes:
            del graph.initializers[name]
            value.name, value.const_value = parameter, None
            graph.inputs.append(value)


def _merge_tied_weights(graph: ir.Graph, recipes: Mapping[str, Recipe]) -> None:
    """Keep one input for each stored tensor, also where the model has several names for it, such as a tied head."""
    first: dict[str, ir.Value] = {}
    for value in list(graph.inputs):
        stored = recipes[value.name].stored if value.name is not None and value.name in recipes else None
        if stored is None:
            continue
        if stored in first:
            value.replace_all_uses_with(first[stored])
            graph.inputs.remove(value)
        else:
            first[stored] = value


def _multiply_tied_heads(graph: ir.Graph, recipes: Mapping[str, Recipe]) -> None:
    """Multiply a tied head by the embedding as it is stored, in place.

    For `MatMul(h, Transpose(W))` ONNX Runtime folds a transposed copy of W, and keeps W itself for the embedding.
    `Gemm` reads W transposed, but takes matrices only, so the hidden states are flattened to `(batch * seq, hidden)`.
    """
    for weight in graph.inputs:
        operators = {use.node.op_type for use in weight.uses()}
        if weight.name not in recipes or operators <= {"Transpose"}:
            continue
        for transpose in [use.node for use in weight.uses() if use.node.op_type == "Transpose"]:
            for product in [use.node for use in transpose.outputs[0].uses() if use.node.op_type == "MatMul"]:
                _replace_by_gemm(graph, product, weight)


def _replace_by_gemm(graph: ir.Graph, product: ir.Node, weight: ir.Value) -> None:
    hidden = product.inputs[0]
    assert weight.shape is not None
    rows, width = weight.shape
    assert hidden is not None
    tape = ir.tape.Tape()
    flat = tape.op("Reshape", [hidden, _shape_constant(graph, -1, width)])
    logits = tape.op("Gemm", [flat, weight], {"transB": 1})
    sizes = tape.op("Shape", [hidden], {"end": -1})
    shape = tape.op("Concat", [sizes, _shape_constant(graph, rows)], {"axis": 0})
    result = tape.op("Reshape", [logits, shape])
    for node in tape.nodes:
        node.metadata_props.update(product.metadata_props)
    old = product.outputs[0]
    result.name, result.type, result.shape = old.name, old.type, old.shape
    graph.insert_before(product, tape.nodes)
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    old.name = None
    graph.remove(product, safe=True)


def _shape_constant(graph: ir.Graph, *numbers: Any) -> ir.Value:
    return int_constant(graph, "shape_" + "_".join(str(number) for number in numbers), *numbers)


def _name_nodes(graph: ir.Graph) -> None:
    """Name each node after its module, operator and a number: `model.layers.3.self_attn/MatMul_2`."""
    counts: Counter[str] = Counter()
    fixed = {value.name for value in (*graph.inputs, *graph.outputs)}
    for node in graph:
        name = f"{_module(node)}/{node.op_type}".lstrip("/")
        counts[name] += 1
        node.name = f"{name}_{counts[name]}"
        for number, value in enumerate(node.outputs):
            if value.name not in fixed:
                value.name = node.name if len(node.outputs) == 1 else f"{node.name}.{number}"
            if value not in graph.outputs:
                value.shape = None


def _remove_trace_metadata(model: ir.Model) -> None:
    """Remove the metadata that torch writes: most of a graph's bytes, and paths of the machine that made it."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    outputs = [value for node in model.graph for value in node.outputs]
    for value in (*model.graph.inputs, *model.graph.initializers.values(), *outputs):
        value.metadata_props.clear()


def _module(node: ir.Node) -> str:
    """The innermost module in which a node was traced."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    names = [each.strip(" '\"") for each in scopes.strip("[]").split(",")]
    inner = names[-2] if len(names) > 1 else ""  # the last name is the operation itself
    return inner.removeprefix(_WRAPPER) if inner != "model" else ""


def _name_free_sizes(graph: ir.Graph) -> None:
    """Give the free sizes of inputs and outputs the names that other ONNX exporters use."""
    for value in graph.inputs:
        if value.name in ("input_ids", "position_ids"):
            value.shape = ir.Shape(["batch_size", "sequence_length"])
        elif value.name == "attention_mask":
            value.shape = ir.Shape(["batch_size", "total_sequence_length"])
        elif value.name is not None and value.name.startswith("past_key_values."):
            value.shape = _cache_shape(value, "past_sequence_length")
    for value in graph.outputs:
        assert value.shape is not None
        if value.name == "logits":
            value.shape = ir.Shape(["batch_size", "sequence_length", value.shape[-1]])
        else:
            value.shape = _cache_shape(value, "total_sequence_length")


def _cache_shape(value: ir.Value, length: str) -> ir.Shape:
    assert value.shape is not None
    return ir.Shape(["batch_size", value.shape[1], length, value.shape[3]])
