"""Trace one decoder layer of each kind and copy its nodes for the others, so that tracing time does not grow with L.

During the trace, the first and the last layer of each kind run; one placeholder node stands for each of the others.
Afterwards each placeholder is replaced by a copy of the first layer's nodes, on its own layer's weights and cache slot.
The last layer is a control: its traced nodes must equal a copy of the first. If they do not, or if a layer reads a
value that another layer made, the whole model is traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from transformers import Cache

from .layer_copies import LayerCopier, NotRepeatableError
from .layer_kinds import group_by_kind
from .marks import LAYER_INPUT, MARKS, PLACEHOLDER, is_mark, marked_layers
from .nodes import dependents
from .recipes import Recipe


@dataclass
class _Kind:
    """Layers that differ only in their weights.

    Attributes:
        layers: their indices, in order.
        arguments: the first layer's arguments, without the hidden states.
        output: what the first layer returned.
    """

    layers: list[int]
    arguments: tuple = ()
    output: Any = None


class Repeats:
    """Which layers of a model are traced, and which are copies.

    Args:
        model: the native model.
        layers: its decoder layers; none, to trace the whole model.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module]):
        self._layers = layers
        names = {id(module): name for name, module in model.named_modules()}
        self._paths = [names[id(layer)] for layer in layers]
        self._kinds = [_Kind(indices) for indices in group_by_kind(layers) if len(indices) > 2]

    @property
    def copies(self) -> list[int]:
        """Indices of the layers that are not traced."""
        return sorted(index for kind in self._kinds for index in kind.layers[1:-1])

    @contextmanager
    def placeholders(self) -> Iterator[None]:
        """Trace each layer that is a copy as one placeholder node."""
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
            kind.output = forward(*args, **kwargs)
            return kind.output

        def copied(*args, **kwargs):
            if not _same(_without_hidden(args, kwargs), kind.arguments):
                raise NotRepeatableError(f"{self._paths[index]} is called with other arguments than {kind.layers[0]}")
            return _like(kind.output, _placeholder(index, _hidden(args, kwargs), _slot(index, args, kwargs)))

        return first if index == kind.layers[0] else copied

    def fill(self, graph: ir.Graph, recipes: Mapping[str, Recipe]) -> None:
        """Replace each placeholder by a copy of the first layer of its kind, in place.

        Raises:
            NotRepeatableError: the last layer of a kind is not a copy of the first; trace the whole model.
        """
        traced, of_layers = marked_layers(graph), _values_after_layer_inputs(graph)
        for kind in self._kinds:
            first, *others, last = kind.layers
            copier = LayerCopier(graph, traced[first], first, self._paths[first], recipes, of_layers)
            copier.check_copy(traced[last], last, self._paths[last])
            for index in others:
                copier.replace(traced[index], index, self._paths[index])


def _values_after_layer_inputs(graph: ir.Graph) -> set[ir.Value]:
    """All values that depend on the input of any layer, the marked inputs included."""
    sources = {node.outputs[0] for node in graph if is_mark(node, LAYER_INPUT)}
    return sources.union(*(node.outputs for node in dependents(sources, graph)))


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
    """Whether two arguments are equal; tensors and other objects only if they are identical."""
    if isinstance(one, (list, tuple)) and type(one) is type(other):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, (bool, int, float, str)) and type(one) is type(other):
        return one == other
    return one is other


def _like(output, hidden: torch.Tensor):
    """Hidden states in the form in which a layer returned its own; the layer must return nothing else."""
    if isinstance(output, torch.Tensor):
        return hidden
    if isinstance(output, tuple) and all(each is None for each in output[1:]):
        return (hidden, *output[1:])
    raise NotRepeatableError("a layer returns more than hidden states")


def _placeholder(index: int, hidden: torch.Tensor, slot) -> torch.Tensor:
    """One node for a whole layer, from hidden states and past to hidden states and what the cache then holds."""
    inputs = (hidden, slot.keys, slot.values)
    length = hidden.shape[1]
    held = [(*each.shape[:2], each.shape[2] + length, each.shape[3]) for each in inputs[1:]]
    output, slot.keys, slot.values = torch.onnx.ops.symbolic_multi_out(
        f"{MARKS}::{PLACEHOLDER}",
        inputs,
        {"layer": index},
        dtypes=[each.dtype for each in inputs],
        shapes=[hidden.shape, *held],
        version=1,
    )
    return output
