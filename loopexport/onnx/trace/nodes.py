"""Find nodes of a graph, copy them, replace values, add constants."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir


def dependents(sources: Iterable[ir.Value], nodes: Iterable[ir.Node]) -> list[ir.Node]:
    """The nodes that depend on any of the sources, in order.

    Args:
        sources: values of the graph.
        nodes: nodes in topological order.
    """
    reached, found = set(sources), []
    for node in nodes:
        if any(value in reached for value in node.inputs):
            reached.update(node.outputs)
            found.append(node)
    return found


def copy_node(
    node: ir.Node,
    name: str,
    inputs: Iterable[ir.Value | None],
    attributes: Iterable[ir.Attr],
    values: dict[ir.Value, ir.Value | None],
) -> ir.Node:
    """A copy of a node on other inputs; `values` gets the copy's outputs, by the node's own."""
    copy = ir.Node(node.domain, node.op_type, inputs, attributes, num_outputs=len(node.outputs), name=name)
    for number, (value, copied) in enumerate(zip(node.outputs, copy.outputs, strict=True)):
        copied.name = name if len(node.outputs) == 1 else f"{name}.{number}"
        copied.type = value.type
        values[value] = copied
    return copy


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Use `new` wherever `old` is used; as a graph output it takes over the name, type and shape of `old`."""
    if old.is_graph_output():
        new.name, new.type, new.shape = old.name, old.type, old.shape
        old.name = None
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def int_constant(graph: ir.Graph, name: str, *numbers: int) -> ir.Value:
    """A constant of int64 numbers, `(len(numbers),)`; two calls with one name share it."""
    if name not in graph.initializers:
        tensor = ir.tensor(list(numbers), dtype=ir.DataType.INT64, name=name)
        graph.register_initializer(ir.Value(name=name, const_value=tensor))
    return graph.initializers[name]
