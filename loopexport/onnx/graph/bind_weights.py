"""Bind a graph's weights to bytes on disk: the export's own shards, or one file of another dtype, shared by all K."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
import torch

from loopexport.base.checkpoint import Checkpoint
from loopexport.errors import OnnxError
from loopexport.files.digests import Progress
from loopexport.onnx.quantise.matrices import MatrixPart, SourceReader
from loopexport.onnx.trace.nodes import int_constant
from loopexport.onnx.trace.recipes import Recipe
from loopexport.onnx.trace.skeleton import STORED_DTYPES
from loopexport.onnx.weights.source import Weights

IR_DTYPES = {
    "F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16, "I64": ir.DataType.INT64,
}  # fmt: skip
TORCH_DTYPES = {
    **{IR_DTYPES[name]: dtype for name, dtype in STORED_DTYPES.items()},
    ir.DataType.UINT8: torch.uint8,
}
ALIGNMENT_BYTES = 4096  # of tensors in a file of ours, so that it can be mapped into memory

Source: TypeAlias = Recipe | MatrixPart  # what a weight in a file of ours is made of


def attach_stored(model: ir.Model, recipes: Mapping[str, Recipe], checkpoint: Checkpoint) -> None:
    """Bind the weight inputs of a graph to the bytes of the checkpoint's shards, in place.

    Nodes put together what the checkpoint stores in pieces, such as experts. ONNX Runtime runs them once, when it makes
    a session. All iterations share the pieces and the nodes.

    Raises:
        OnnxError: a graph cannot make some weight of the stored tensors; use another dtype than the stored one.
    """
    places = {name: (shard.name, each) for shard in checkpoint.shards for name, each in shard.header.tensors.items()}
    binder = _Binder(model.graph, places)
    for value in _weight_inputs(model.graph, recipes):
        model.graph.inputs.remove(value)
        assert value.name is not None
        recipe = recipes[value.name]
        if recipe.stored is not None:
            value.const_value = _external(recipe.stored, *places[recipe.stored])
            value.name = value.name if value.name == recipe.stored else recipe.stored
            model.graph.register_initializer(value)
        else:
            value.replace_all_uses_with(binder.build(recipe))
    model.graph.sort()


def attach_file(model: ir.Model, layout: Mapping[str, tuple[int, int]], file_name: str) -> None:
    """Bind the weight inputs of a graph to a file written by `write_file`, in place."""
    for value in [value for value in model.graph.inputs if value.name in layout]:
        model.graph.inputs.remove(value)
        assert value.name is not None
        assert value.dtype is not None
        assert value.shape is not None
        start, length = layout[value.name]
        value.const_value = ir.ExternalTensor(file_name, start, length, value.dtype, shape=value.shape, name=value.name)
        model.graph.register_initializer(value)


def stored_bytes(model: ir.Model) -> dict[tuple[str, int], int]:
    """Bytes of each region of an external file that a graph reads, by file name and first byte."""
    tensors = [value.const_value for value in model.graph.initializers.values()]
    return {
        (str(tensor.location), tensor.offset or 0): tensor.length or 0
        for tensor in tensors
        if isinstance(tensor, ir.ExternalTensor)
    }


def file_layout(model: ir.Model, sources: Mapping[str, Source]) -> tuple[dict[str, tuple[int, int]], int]:
    """First byte and number of bytes of each weight in a file of our own, and the file's size in bytes.

    Two inputs with the same array, such as the codes of a tied head, have the same bytes.
    """
    layout: dict[str, tuple[int, int]] = {}
    places: dict[Any, tuple[int, int]] = {}
    end = 0
    for value in _weight_inputs(model.graph, sources):
        assert value.name is not None
        assert value.dtype is not None
        assert value.shape is not None
        source = sources[value.name]
        array = source if isinstance(source, MatrixPart) else value.name
        if array not in places:
            start = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            places[array] = (start, int(value.dtype.itemsize * np.prod(value.shape.numpy())))
            end = sum(places[array])
        layout[value.name] = places[array]
    return layout, end


def write_file(
    path: Path,
    layout: Mapping[str, tuple[int, int]],
    sources: Mapping[str, Source],
    weights: Weights,
    dtypes: Mapping[str, ir.DataType],
    progress: Progress = lambda count: None,
) -> None:
    """Write the weights in the dtypes of a graph, one tensor at a time.

    Args:
        path: the file.
        layout: from `file_layout`.
        sources: what each weight is made of.
        weights: the stored tensors.
        dtypes: the dtype of each weight.
        progress: called with the number of bytes after each tensor.
    """
    reader = SourceReader(weights)
    written = set()
    with path.open("wb") as file:
        for name, (start, length) in layout.items():
            if (start, length) in written:
                continue
            written.add((start, length))
            value = reader.read(sources[name])
            raw = value.to(TORCH_DTYPES[dtypes[name]]).contiguous().reshape(-1).view(torch.uint8)
            file.seek(start)
            file.write(raw.numpy().data)
            progress(length)


def _weight_inputs(graph: ir.Graph, recipes: Mapping[str, Any]) -> list[ir.Value]:
    return [value for value in graph.inputs if value.name in recipes]


def _external(name: str, file_name: str, tensor) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        file_name, tensor.start, tensor.nbytes, IR_DTYPES[tensor.dtype], shape=ir.Shape(tensor.shape), name=name
    )


class _Binder:
    """Makes weights of stored pieces, as nodes of a graph.

    Args:
        graph: the graph, which gets the nodes.
        places: the shard's file name and the header entry of each stored tensor.
    """

    def __init__(self, graph: ir.Graph, places: Mapping[str, tuple[str, Any]]):
        self.graph = graph
        self.places = places
        self.built: dict[int, ir.Value] = {}

    def build(self, recipe: Recipe) -> ir.Value:
        """The value of a recipe; each recipe is built once."""
        if id(recipe) not in self.built:
            self.built[id(recipe)] = self._stored(recipe.stored) if recipe.stored else self._made(recipe)
        return self.built[id(recipe)]

    def _stored(self, name: str) -> ir.Value:
        if name not in self.graph.initializers:
            tensor = _external(name, *self.places[name])
            self.graph.register_initializer(ir.Value(name=name, const_value=tensor))
        return self.graph.initializers[name]

    def _made(self, recipe: Recipe) -> ir.Value:
        operator = recipe.function.overloadpacket.__name__
        builders: dict[str, Any] = {
            "stack": self._stack, "cat": self._cat, "slice": self._slice, "transpose": self._transpose,
            "_to_copy": self._cast, "split_with_sizes": self._split,
        }  # fmt: skip
        if operator not in builders:
            raise OnnxError(
                f"{operator} makes a weight of stored tensors, and a graph over the shards supports only "
                f"{', '.join(builders)}; use --dtype fp32, fp16 or bf16, which writes a converted copy of the weights"
            )
        return builders[operator](recipe, *recipe.args, **recipe.kwargs)

    def _node(self, operator: str, inputs: list[ir.Value], **attributes) -> ir.Value:
        node = ir.node(operator, inputs, attributes, name=f"weights/{operator}_{len(self.built)}_{inputs[0].name}")
        node.outputs[0].name = node.name
        self.graph.append(node)
        return node.outputs[0]

    def _ints(self, *numbers: int) -> ir.Value:
        return int_constant(self.graph, "weights/" + "_".join(map(str, numbers)), *numbers)

    def _stack(self, recipe, tensors, dim=0) -> ir.Value:
        rows = [self._node("Unsqueeze", [self.build(each), self._ints(dim)]) for each in tensors]
        return self._node("Concat", rows, axis=dim)

    def _cat(self, recipe, tensors, dim=0) -> ir.Value:
        return self._node("Concat", [self.build(each) for each in tensors], axis=dim)

    def _cast(self, recipe, tensor, dtype=None, **kwargs) -> ir.Value:
        ir_dtypes = {torch_dtype: ir_dtype for ir_dtype, torch_dtype in TORCH_DTYPES.items()}
        return self._node("Cast", [self.build(tensor)], to=ir_dtypes[dtype])

    def _transpose(self, recipe, tensor, first, second) -> ir.Value:
        value = self.build(tensor)
        order = list(range(recipe.rank))
        order[first], order[second] = order[second], order[first]
        return self._node("Transpose", [value], perm=order)

    def _split(self, recipe, tensor, sizes, dim=0) -> ir.Value:
        start = sum(sizes[: recipe.item])
        return self._slice(recipe, tensor, dim, start, start + sizes[recipe.item])

    def _slice(self, recipe, tensor, dim=0, start=0, end=None, step=1) -> ir.Value:
        bounds = [self._ints(number) for number in (start or 0, 2**62 if end is None else end, dim, step)]
        return self._node("Slice", [self.build(tensor), *bounds])
