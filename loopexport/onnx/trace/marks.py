"""Marks: nodes of our own in a traced graph. Put them in, find them again, remove them.

They show where layers begin and end, what attention reads and what routers return. A finished graph has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import onnx_ir as ir
import torch
from torch import nn

from loopexport.templates.looped_routing import Routers

from .nodes import replace_value

MARKS = "loopexport"  # the domain of these nodes

LAYER_INPUT, LAYER_OUTPUT = "LayerInput", "LayerOutput"  # hidden states before and after a layer; attribute `layer`
READ = "Read"  # what attention reads, past and new; attributes `slot`, and `value`: 0 for keys, 1 for values
ROUTE = "Route"  # what a router returns; attribute `layer`
HEAD_INPUT = "HeadInput"  # the hidden states that enter the output head

# Two nodes of the same domain that the next steps replace by a layer's nodes.
PLACEHOLDER = "LayerPlaceholder"  # in place of a layer that is a copy of another; attribute `layer`
RUN_LAYER = "RunLayer"  # in the graph of a rule; attribute `position` in the loop body


# ---------------------------------------------------------------------------------------------------------------------
# Put marks into a trace.
# ---------------------------------------------------------------------------------------------------------------------


def mark(kind: str, tensor: torch.Tensor, **attributes: int) -> torch.Tensor:
    """The same tensor, after a node `loopexport::kind` in the graph."""
    attrs: dict[str, Any] = {**attributes}
    return torch.onnx.ops.symbolic(
        f"{MARKS}::{kind}", (tensor,), attrs, dtype=tensor.dtype, shape=tensor.shape, version=1
    )


@contextmanager
def marked(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Mark the input and output of each decoder layer, and what its routers return."""
    with ExitStack() as hooks:
        for index, layer in enumerate(layers):
            for handle in _mark_layer(index, layer):
                hooks.callback(handle.remove)
        yield


def _mark_layer(index: int, layer: nn.Module):
    def enter(module, args, kwargs):
        if args:
            return (mark(LAYER_INPUT, args[0], layer=index), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": mark(LAYER_INPUT, kwargs["hidden_states"], layer=index)}

    def leave(module, args, output):
        if isinstance(output, tuple):
            return (mark(LAYER_OUTPUT, output[0], layer=index), *output[1:])
        return mark(LAYER_OUTPUT, output, layer=index)

    yield layer.register_forward_pre_hook(enter, with_kwargs=True)
    yield layer.register_forward_hook(leave)
    for path in Routers.of(layer).known:
        yield layer.get_submodule(path).register_forward_hook(lambda module, args, output: _mark_route(index, output))


def _mark_route(index: int, output):
    if isinstance(output, (tuple, list)):
        return type(output)(_mark_route(index, each) for each in output)
    return mark(ROUTE, output, layer=index) if isinstance(output, torch.Tensor) else output


# ---------------------------------------------------------------------------------------------------------------------
# Find marks in a graph, and remove them.
# ---------------------------------------------------------------------------------------------------------------------


class MarkedLayer(NamedTuple):
    """A decoder layer in a graph, between its two marks.

    Attributes:
        entry: the hidden states that enter, after the first mark.
        nodes: all nodes between the marks, in order.
        output: the hidden states that leave, before the second mark.
        output_mark: the second mark.
    """

    entry: ir.Value
    nodes: list[ir.Node]
    output: ir.Value
    output_mark: ir.Node


def is_mark(node: ir.Node, kind: str | None = None) -> bool:
    """Whether a node is a mark; with `kind`, whether it is a mark of that kind."""
    return node.domain == MARKS and kind in (None, node.op_type)


def marked_layers(graph: ir.Graph) -> dict[int, MarkedLayer]:
    """Each marked layer of a graph, by its number in the decoder."""
    layers: dict[int, MarkedLayer] = {}
    inside: list[ir.Node] = []
    for node in graph:
        if is_mark(node, LAYER_OUTPUT):
            output = node.inputs[0]
            assert output is not None
            layers[node.attributes["layer"].as_int()] = MarkedLayer(inside[0].outputs[0], inside[1:], output, node)
        if is_mark(node, LAYER_INPUT):
            inside = []
        inside.append(node)
    return layers


def remove_marks(graph: ir.Graph) -> None:
    """Remove all marks, also those inside branches."""
    for node in [node for node in graph.all_nodes() if is_mark(node)]:
        owner = node.graph
        assert owner is not None
        inner, outer = node.inputs[0], node.outputs[0]
        assert inner is not None
        replace_value(outer, inner)
        owner.remove(node, safe=True)
