"""Copy a traced layer's nodes onto the weights and the cache slot of another layer."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from .marks import MARKS, PLACEHOLDER, READ, MarkedLayer, is_mark
from .nodes import copy_node, dependents, replace_value
from .recipes import Recipe


class NotRepeatableError(Exception):
    """A layer is not a copy of the first of its kind; trace the whole model."""


class LayerCopier:
    """Makes copies of one traced layer.

    Args:
        graph: the graph, which gets the copies.
        layer: the traced layer in it.
        index, path: the layer's number in the decoder and its name in the model.
        recipes: the names of all weights.
        of_layers: the values that depend on the input of any layer.

    Raises:
        NotRepeatableError: the layer reads a value of another layer.
    """

    def __init__(
        self,
        graph: ir.Graph,
        layer: MarkedLayer,
        index: int,
        path: str,
        recipes: Mapping[str, Recipe],
        of_layers: set[ir.Value],
    ):
        self.graph, self.layer, self.index, self.path, self.recipes = graph, layer, index, path, recipes
        self.inputs = {value.name: value for value in graph.inputs}
        self.own_inputs = _inputs_of(graph, index, path)
        self.nodes = _own_nodes(layer, self.own_inputs)
        inside = {value for node in self.nodes for value in node.outputs}
        for node in self.nodes:
            for value in node.inputs:
                if value in of_layers and value not in inside and value is not layer.entry:
                    raise NotRepeatableError(f"{path} reads {value.name} of another layer")

    def replace(self, target: MarkedLayer, index: int, path: str) -> None:
        """Replace the placeholder of a layer by a copy, in place.

        Raises:
            NotRepeatableError: a copy is impossible, for the reason that the message gives.
        """
        (placeholder,) = (node for node in target.nodes if is_mark(node, PLACEHOLDER))
        values: dict[ir.Value, ir.Value | None] = {self.layer.entry: target.entry}
        copies = [self._copy(node, values, index, path) for node in self.nodes]
        self.graph.insert_before(placeholder, copies)
        reads = [node for node in self.nodes if is_mark(node, READ)]
        made = [values[self.layer.output], *(values[read.outputs[0]] for read in reads)]
        if len(made) != len(placeholder.outputs):
            raise NotRepeatableError(f"{self.path} does not store keys and values once")
        for old, new in zip(placeholder.outputs, made, strict=True):
            assert new is not None
            replace_value(old, new)
        self.graph.remove(placeholder, safe=True)

    def check_copy(self, target: MarkedLayer, index: int, path: str) -> None:
        """Check that another traced layer is exactly what a copy of this one would be.

        Raises:
            NotRepeatableError: it is not; the message names the first difference.
        """
        nodes = _own_nodes(target, _inputs_of(self.graph, index, path))
        values: dict[ir.Value, ir.Value | None] = {self.layer.entry: target.entry}
        if len(nodes) != len(self.nodes):
            raise NotRepeatableError(f"{path} has {len(nodes)} nodes where {self.path} has {len(self.nodes)}")
        for ours, theirs in zip(self.nodes, nodes, strict=True):
            expected = [self._mapped(value, values, index, path) for value in ours.inputs]
            attributes = [self._attribute(ours, each, index) for each in ours.attributes.values()]
            if (
                (ours.domain, ours.op_type) != (theirs.domain, theirs.op_type)
                or len(expected) != len(theirs.inputs)
                or not all(map(_is_same_value, expected, theirs.inputs))
                or _as_text(attributes) != _as_text(theirs.attributes.values())
            ):
                raise NotRepeatableError(f"{theirs.name} differs from {ours.name}")
            values.update(zip(ours.outputs, theirs.outputs, strict=True))
        if values.get(self.layer.output) is not target.output:
            raise NotRepeatableError(f"{path} does not leave its result where {self.path} does")

    def _copy(self, node: ir.Node, values: dict[ir.Value, ir.Value | None], index: int, path: str) -> ir.Node:
        inputs = [self._mapped(value, values, index, path) for value in node.inputs]
        attributes = [self._attribute(node, each, index) for each in node.attributes.values()]
        copy = copy_node(node, self._renamed(str(node.name), index, path), inputs, attributes, values)
        for value, copied in zip(node.outputs, copy.outputs, strict=True):
            copied.shape = value.shape
        return copy

    def _mapped(self, value: ir.Value | None, values, index: int, path: str) -> ir.Value | None:
        """What a copy reads in the place of a value: another copy's output, the other layer's input, or the same."""
        if value is None or value in values:
            return None if value is None else values[value]
        return self._input(value, index, path) if value in self.own_inputs else value

    def _input(self, value: ir.Value, index: int, path: str) -> ir.Value:
        """The other layer's weight or past in the place of this layer's."""
        name = self._renamed(str(value.name), index, path)
        if name not in self.inputs:
            if name not in self.recipes:
                raise NotRepeatableError(f"there is no weight {name}")
            self.inputs[name] = ir.Value(name=name, type=value.type, shape=value.shape)
            self.graph.inputs.append(self.inputs[name])
        return self.inputs[name]

    def _attribute(self, node: ir.Node, attribute: ir.Attr, index: int) -> ir.Attr:
        if attribute.type == ir.AttributeType.GRAPH:
            raise NotRepeatableError(f"{node.name} contains a subgraph")
        if node.domain == MARKS and attribute.name in ("layer", "slot"):
            if attribute.as_int() != self.index:
                raise NotRepeatableError(f"{self.path} uses slot {attribute.as_int()}")
            return ir.AttrInt64(attribute.name, index)
        return attribute

    def _renamed(self, name: str, index: int, path: str) -> str:
        slot = f"past_key_values.{self.index}."
        if name.startswith(slot):
            return f"past_key_values.{index}.{name.removeprefix(slot)}"
        return path + name.removeprefix(self.path) if name.startswith(self.path) else f"{path}/{name}"


def _inputs_of(graph: ir.Graph, index: int, path: str) -> set[ir.Value]:
    """The weights of a layer, and its past."""
    return {value for value in graph.inputs if str(value.name).startswith((f"{path}.", f"past_key_values.{index}."))}


def _own_nodes(layer: MarkedLayer, own_inputs: set[ir.Value]) -> list[ir.Node]:
    """The nodes that depend on a layer's hidden states, weights or past; the others serve all layers."""
    return dependents({layer.entry, *own_inputs}, layer.nodes)


def _is_same_value(one: ir.Value | None, other: ir.Value | None) -> bool:
    """Whether two values are identical, or equal constants."""
    if one is other:
        return True
    if one is None or other is None or one.const_value is None or other.const_value is None:
        return False
    return one.const_value.dtype == other.const_value.dtype and (
        one.const_value.numpy().tobytes() == other.const_value.numpy().tobytes()
        and one.const_value.shape == other.const_value.shape
    )


def _as_text(attributes) -> list[str]:
    return sorted(str(each) for each in attributes)
