"""Trace one decoder layer of each kind, and make the others by copying its nodes: a trace's time must not grow with L.

While the model is traced, the first and the last layer of each kind run, and the others are stood in for by one node.
In the graph each stand-in is then replaced by a copy of the first's nodes on the layer's own weights and cache slot.
The last is a control: its traced nodes must be what copying the first would make of it. Where that fails, or a layer
reads what another one made, the model is traced whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import onnx_ir as ir
import torch
from torch import nn
from transformers import Cache

from .layer_kinds import kinds
from .marks import LAYER_INPUT, LAYER_OUTPUT, MARKS, READ, is_mark
from .skeleton import Recipe

STAND_IN = "StandIn"


class NotRepeatableError(Exception):
    """A layer that was stood in for is not a copy of the first of its kind; trace the model whole."""


@dataclass
class _Kind:
    """Layers that differ in weights alone.

    Attributes:
        layers: their indices, in order.
        arguments: what the first was called with, behind the hidden states.
        answer: what it returned.
    """

    layers: list[int]
    arguments: tuple = ()
    answer: Any = None


class Repeats:
    """Which layers of a model are traced, and which are copies.

    Args:
        model: the native model.
        layers: its decoder layers.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module]):
        self._layers = layers
        names = {id(module): name for name, module in model.named_modules()}
        self._paths = [names[id(layer)] for layer in layers]
        self._kinds = [_Kind(indices) for indices in kinds(layers) if len(indices) > 2]

    @property
    def copies(self) -> list[int]:
        """Indices of the layers that are not traced."""
        return sorted(index for kind in self._kinds for index in kind.layers[1:-1])

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """While this is entered, layers that are copies are one node each."""
        forwards = {}
        for kind in self._kinds:
            for index in kind.layers[:-1]:
                forwards[index] = self._layers[index].forward
                self._layers[index].forward = self._replaced(index, kind, forwards[index])
        try:
            yield
        finally:
            for index in forwards:
                del self._layers[index].forward

    def _replaced(self, index: int, kind: _Kind, forward: Callable) -> Callable:
        def first(*args, **kwargs):
            kind.arguments = _without_hidden(args, kwargs)
            kind.answer = forward(*args, **kwargs)
            return kind.answer

        def other(*args, **kwargs):
            if not _same(_without_hidden(args, kwargs), kind.arguments):
                raise NotRepeatableError(f"{self._paths[index]} is called with other arguments than {kind.layers[0]}")
            return _like(kind.answer, _stand_in(index, _hidden(args, kwargs), _slot(index, args, kwargs)))

        return first if index == kind.layers[0] else other

    def expand(self, graph: ir.Graph, recipes: Mapping[str, Recipe]) -> None:
        """Put a copy of the first of its kind in the place of each stand-in.

        Raises:
            NotRepeatableError: a kind's last layer, which was traced, is not a copy of its first.
        """
        bodies, of_layers = _bodies(graph), _dependents(graph)
        for kind in self._kinds:
            first, *others, last = kind.layers
            template = _Template(graph, bodies[first], first, self._paths[first], recipes, of_layers)
            template.check_copy(bodies[last], last, self._paths[last])
            for index in others:
                template.replace(bodies[index], index, self._paths[index])


# ---------------------------------------------------------------------------------------------------------------------
# Calls of layers.
# ---------------------------------------------------------------------------------------------------------------------


def _hidden(args, kwargs):
    return args[0] if args else kwargs["hidden_states"]


def _without_hidden(args, kwargs) -> tuple:
    return args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}


def _slot(index: int, args, kwargs):
    """A layer's own cache slot."""
    for each in (*args, *kwargs.values()):
        if isinstance(each, Cache) and index < len(each.layers):
            return each.layers[index]
    raise NotRepeatableError(f"layer {index} has no cache slot of its own")


def _same(one, other) -> bool:
    """Whether arguments are the same: tensors and objects must be one."""
    if isinstance(one, (list, tuple)) and type(one) is type(other):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, (bool, int, float, str)) and type(one) is type(other):
        return one == other
    return one is other


def _like(answer, hidden: torch.Tensor):
    """Hidden states in the form of an answer that holds nothing else."""
    if isinstance(answer, torch.Tensor):
        return hidden
    if isinstance(answer, tuple) and all(each is None for each in answer[1:]):
        return (hidden, *answer[1:])
    raise NotRepeatableError("a layer answers more than hidden states")


def _stand_in(index: int, hidden: torch.Tensor, slot) -> torch.Tensor:
    """One node for a layer, which takes its hidden states and past, and makes what comes out and is stored."""
    inputs = (hidden, slot.keys, slot.values)
    length = hidden.shape[1]
    held = [(*each.shape[:2], each.shape[2] + length, each.shape[3]) for each in inputs[1:]]
    output, slot.keys, slot.values = torch.onnx.ops.symbolic_multi_out(
        f"{MARKS}::{STAND_IN}",
        inputs,
        {"layer": index},
        dtypes=[each.dtype for each in inputs],
        shapes=[hidden.shape, *held],
        version=1,
    )
    return output


# ---------------------------------------------------------------------------------------------------------------------
# Copies in the graph.
# ---------------------------------------------------------------------------------------------------------------------


class _Body(NamedTuple):
    """The nodes between a layer's marks, the value that enters and the one that leaves."""

    entry: ir.Value
    nodes: list[ir.Node]
    output: ir.Value


def _bodies(graph: ir.Graph) -> dict[int, _Body]:
    bodies: dict[int, _Body] = {}
    inside: list[ir.Node] = []
    for node in graph:
        if is_mark(node, LAYER_OUTPUT):
            output = node.inputs[0]
            assert output is not None
            bodies[node.attributes["layer"].as_int()] = _Body(inside[0].outputs[0], inside[1:], output)
        if is_mark(node, LAYER_INPUT):
            inside = []
        inside.append(node)
    return bodies


def _dependents(graph: ir.Graph) -> set[ir.Value]:
    """Values that depend on what enters a layer."""
    found: set[ir.Value] = set()
    for node in graph:
        if is_mark(node, LAYER_INPUT) or any(value in found for value in node.inputs):
            found.update(node.outputs)
    return found


class _Template:
    """A traced layer, as something to copy.

    Args:
        graph: the graph.
        body: the layer in it.
        index, path: of the layer.
        recipes: names of all weights.
        of_layers: values that depend on what enters any layer.
    """

    def __init__(self, graph: ir.Graph, body: _Body, index: int, path: str, recipes, of_layers: set[ir.Value]):
        self.graph, self.body, self.index, self.path, self.recipes = graph, body, index, path, recipes
        self.inputs = {value.name: value for value in graph.inputs}
        own = _inputs_of(graph, index, path)
        self.own = own
        self.nodes = _own_nodes(body, own)
        inside = {value for node in self.nodes for value in node.outputs}
        for node in self.nodes:
            for value in node.inputs:
                if value in of_layers and value not in inside and value is not body.entry:
                    raise NotRepeatableError(f"{path} reads {value.name} of another layer")

    def _renamed(self, name: str, index: int, path: str) -> str:
        slot = f"past_key_values.{self.index}."
        if name.startswith(slot):
            return f"past_key_values.{index}.{name.removeprefix(slot)}"
        return path + name.removeprefix(self.path) if name.startswith(self.path) else f"{path}/{name}"

    def _input(self, value: ir.Value, index: int, path: str) -> ir.Value:
        """The layer's own weight or past in the place of the first's."""
        name = self._renamed(str(value.name), index, path)
        if name not in self.inputs:
            if name not in self.recipes:
                raise NotRepeatableError(f"there is no weight {name}")
            self.inputs[name] = ir.Value(name=name, type=value.type, shape=value.shape)
            self.graph.inputs.append(self.inputs[name])
        return self.inputs[name]

    def replace(self, body: _Body, index: int, path: str) -> None:
        """Put a copy in the place of a stand-in."""
        (stand_in,) = (node for node in body.nodes if is_mark(node, STAND_IN))
        values: dict[ir.Value, ir.Value] = {self.body.entry: body.entry}
        copies = [self._copy(node, values, index, path) for node in self.nodes]
        self.graph.insert_before(stand_in, copies)
        reads = [node for node in self.nodes if is_mark(node, READ)]
        made = [values[self.body.output], *(values[read.outputs[0]] for read in reads)]
        if len(made) != len(stand_in.outputs):
            raise NotRepeatableError(f"{self.path} does not store keys and values once")
        for old, new in zip(stand_in.outputs, made, strict=True):
            if old.is_graph_output():
                new.name, new.shape, new.type = old.name, old.shape, old.type
                old.name = None
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        self.graph.remove(stand_in, safe=True)

    def _copy(self, node: ir.Node, values, index: int, path: str) -> ir.Node:
        inputs = [self._mapped(value, values, index, path) for value in node.inputs]
        name = self._renamed(str(node.name), index, path)
        attributes = [self._attribute(node, each, index) for each in node.attributes.values()]
        copy = ir.Node(node.domain, node.op_type, inputs, attributes, num_outputs=len(node.outputs), name=name)
        for number, (value, own) in enumerate(zip(node.outputs, copy.outputs, strict=True)):
            own.name, own.type = (name if len(node.outputs) == 1 else f"{name}.{number}"), value.type
            own.shape = value.shape
            values[value] = own
        return copy

    def _mapped(self, value: ir.Value | None, values, index: int, path: str) -> ir.Value | None:
        if value is None or value in values:
            return None if value is None else values[value]
        return self._input(value, index, path) if value in self.own else value

    def _attribute(self, node: ir.Node, attribute: ir.Attr, index: int) -> ir.Attr:
        if attribute.type == ir.AttributeType.GRAPH:
            raise NotRepeatableError(f"{node.name} holds a graph of its own")
        if node.domain == MARKS and attribute.name in ("layer", "slot"):
            if attribute.as_int() != self.index:
                raise NotRepeatableError(f"{self.path} uses slot {attribute.as_int()}")
            return ir.AttrInt64(attribute.name, index)
        return attribute

    def check_copy(self, body: _Body, index: int, path: str) -> None:
        """Raise NotRepeatableError unless a traced layer is what a copy would be."""
        nodes = _own_nodes(body, _inputs_of(self.graph, index, path))
        values: dict[ir.Value, ir.Value] = {self.body.entry: body.entry}
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
        if values.get(self.body.output) is not body.output:
            raise NotRepeatableError(f"{path} does not leave its result where {self.path} does")


def _inputs_of(graph: ir.Graph, index: int, path: str) -> set[ir.Value]:
    """The weights of a layer, and its past."""
    return {value for value in graph.inputs if str(value.name).startswith((f"{path}.", f"past_key_values.{index}."))}


def _own_nodes(body: _Body, own: set[ir.Value]) -> list[ir.Node]:
    """Nodes that depend on what enters a layer, on its weights or on its past; others serve all layers alike."""
    reached, found = {body.entry, *own}, []
    for node in body.nodes:
        if any(value in reached for value in node.inputs):
            reached.update(node.outputs)
            found.append(node)
    return found


def _is_same_value(one: ir.Value | None, other: ir.Value | None) -> bool:
    """Whether two values are one, or constants that are equal."""
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
