"""A decoder layer inside a span: which of its nodes an iteration copies, and the cache slots that it reads."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from loopexport.errors import OnnxError
from loopexport.onnx.trace.attention import FUSED, FUSED_DOMAIN
from loopexport.onnx.trace.marks import READ, ROUTE, MarkedLayer, is_mark
from loopexport.onnx.trace.nodes import copy_node, dependents


class LoopLayer:
    """A decoder layer in the graph, ready to be copied.

    Attributes:
        entry, output, output_mark: see `MarkedLayer`.
        nodes: the layer's nodes that depend on `entry`, in order.
        reads, routes: the marks among the nodes: what attention reads, what routers return.
        fused: the fused attentions among the nodes, which join past and new keys themselves.
    """

    def __init__(self, layer: MarkedLayer):
        self.entry, self.output, self.output_mark = layer.entry, layer.output, layer.output_mark
        self.nodes = dependents({layer.entry}, layer.nodes)
        self.reads = [node for node in self.nodes if is_mark(node, READ)]
        self.routes = [node for node in self.nodes if is_mark(node, ROUTE)]
        self.fused = [node for node in self.nodes if is_fused(node)]

    @property
    def pasts(self) -> list[ir.Value]:
        """The cache input of each read."""
        return [past_of(read) for read in self.reads]

    def copy(self, values: dict[ir.Value, ir.Value | None], suffix: str) -> list[ir.Node]:
        """Copy the nodes that the output needs.

        Args:
            values: what to read in place of the layer's own values; gets the values that the copies make.
            suffix: the end of the copies' names.
        """
        copies = []
        for node in _needed(self.output, self.nodes, values):
            copies.append(copy_loop_node(node, values, f"{node.name}/{suffix}"))
        return copies


@dataclass
class SlotPart:
    """The keys, or the values, of the cache slot of one iteration of one layer.

    Attributes:
        natural_layer: the layer's number.
        past, present: the slot's input and output, `(batch, kv_heads, length, head_size)`.
        natural: what the natural pass reads in the same place.
        natural_join: the node that joins past and new there: `Concat`, or a fused attention.
    """

    natural_layer: int
    past: ir.Value
    present: ir.Value
    natural: ir.Value
    natural_join: ir.Node


def copy_loop_node(node: ir.Node, values: dict[ir.Value, ir.Value | None], name: str) -> ir.Node:
    """A copy of a node that reads `values` in place of its own inputs; `values` gets the copy's outputs.

    Raises:
        OnnxError: the node contains a subgraph.
    """
    if any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()):
        raise OnnxError(f"cannot unroll node {node.name}: it contains a subgraph, which cannot be copied")
    inputs = [values.get(value, value) if value is not None else None for value in node.inputs]
    return copy_node(node, name, inputs, node.attributes.values(), values)


def join_of(read: ir.Node) -> ir.Node:
    """The node that joins past and new keys or values for a read: `Concat`, or a fused attention."""
    joined = read.inputs[0]
    assert joined is not None
    join = joined.producer()
    assert join is not None
    return join


def past_of(read: ir.Node) -> ir.Value:
    """The cache input that a read joins with the new keys or values."""
    join = join_of(read)
    past = join.inputs[3 + read.attributes["value"].as_int()] if is_fused(join) else join.inputs[0]
    assert past is not None
    assert str(past.name).startswith("past_key_values."), past.name
    return past


def is_plain_input(value: ir.Value) -> bool:
    """Whether an input belongs to the finished model, and is not a weight."""
    return value.name in ("input_ids", "attention_mask", "position_ids") or str(value.name).startswith(
        "past_key_values."
    )


def drop_presents(copies: list[ir.Node]) -> None:
    """Remove the cache outputs of copied fused attentions that add no keys: nothing reads them, each costs a copy.

    Do not do this to other fused attentions: without these outputs one does not see its own new keys.
    """
    for node in filter(is_fused, copies):
        for value in node.outputs[1:]:
            value.name = ""


def is_fused(node: ir.Node) -> bool:
    """Whether a node is a fused attention, which joins past and new keys and values itself."""
    return (node.domain, node.op_type) == (FUSED_DOMAIN, FUSED)


def _needed(output: ir.Value, nodes: list[ir.Node], given) -> list[ir.Node]:
    """The nodes on which `output` depends, except those that only lead to given values."""
    wanted, found = {output}, []
    for node in reversed(nodes):
        if any(value in wanted and value not in given for value in node.outputs):
            wanted.update(value for value in node.inputs if value is not None)
            found.append(node)
    return found[::-1]
