"""Replace the products of linear layers by `MatMulNBits`, once, before the loop is unrolled.

This quantises the weights of `torch.nn.Linear`, and of GPT-2's `Conv1D`, where every use multiplies by them. It leaves:

    routers             another expert is a large error
    small matrices      fewer than `MIN_ROWS` outputs, or less than one block of inputs
    sparse experts      but in 4 bits, see `experts`
    the head            unless the user asks for it; an embedding that is tied to it follows
    everything else     embeddings, norms, biases, convolutions
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from loopexport.errors import OnnxError
from loopexport.export.quantisation import HEAD_BITS, Quantisation
from loopexport.onnx.trace.nodes import replace_value
from loopexport.onnx.trace.recipes import Recipe
from loopexport.onnx.trace.tracer import Traced
from loopexport.onnx.weights.source import Weights
from loopexport.templates.looped_routing import Routers

from .experts import BITS as EXPERT_BITS
from .experts import quantise_experts
from .kept_codes import StoredSource, stored_layout
from .matrices import MatrixPart, MatrixSource, uncast
from .sensitive import is_sensitive
from .size import MIN_ROWS

DOMAIN, PRODUCT, LOOK_UP = "com.microsoft", "MatMulNBits", "GatherBlockQuantized"

# Activations in 8 bits. On CPUs, any other level is slower than no quantisation at all. Graphs in half precision are
# for GPUs and leave it unset: with it, the CPU's kernel (1.32) is wrong where several nodes share a weight.
ACCURACY_LEVEL = 4

# Types of scales: that of everything that is not quantised.
SCALE_TYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
}

_UNUSED_DEFAULTS = {"alpha": 1.0, "beta": 1.0}


@dataclass(frozen=True)
class _Product:
    """A node that multiplies by a weight.

    Attributes:
        node: a `MatMul` or `Gemm`.
        is_out_first: whether the weight is `(out, in)`.
    """

    node: ir.Node
    is_out_first: bool


def quantise_products(
    traced: Traced, model: Any, sources: Mapping[str, Recipe], quantisation: Quantisation, weights: Weights
) -> dict[str, Recipe | MatrixPart]:
    """Quantise the linear layers of a traced graph, in place.

    Args:
        traced: the trace; its weights are inputs.
        model: the native model.
        sources: the recipe of each weight.
        quantisation: what the user chose, or what the checkpoint has.
        weights: the checkpoint, whose own codes are kept.

    Returns:
        The recipes of the weights that stay, and the sources of the new inputs.
    """
    graph = traced.model.graph
    choice = _Choice(traced, model, sources, quantisation, weights)
    made: dict[str, Recipe | MatrixPart] = dict(sources)
    for weight in list(graph.inputs):
        name = str(weight.name)
        uses = _uses(weight) if name in sources and weight.shape is not None and weight.shape.rank() == 2 else None
        if uses is None:
            continue
        products, look_ups = uses
        sizes = _sizes(weight, products[0].is_out_first)
        source = choice.source(name, sizes, products[0].is_out_first, bool(look_ups))
        if source is None:
            continue
        _Replacement(graph, name, source, sizes, made).replace(products, look_ups)
        for use in list(weight.uses()):  # transposes that nothing reads any more
            graph.remove(use.node, safe=True)
        del made[name]
        graph.inputs.remove(weight)
    graph.opset_imports.setdefault(DOMAIN, 1)
    return quantise_experts(graph, made, choice.of_experts)


class _Choice:
    """Which weights are quantised, and from what."""

    def __init__(
        self, traced: Traced, model: Any, sources: Mapping[str, Recipe], quantisation: Quantisation, weights: Weights
    ):
        self.traced, self.sources, self.quantisation, self.weights = traced, sources, quantisation, weights
        self.heads, self.linear = _head_names(model, sources), _linear_names(model)

    def source(
        self, name: str, sizes: tuple[int, int], is_out_first: bool, is_looked_up: bool
    ) -> MatrixSource | StoredSource | None:
        """What a weight is quantised from; None if it stays as it is."""
        if self.quantisation.kept:
            return None if is_looked_up or not is_out_first else self._stored(self.sources[name], sizes)
        quantisation, is_head = self.quantisation, name in self.heads
        rows, columns = sizes
        if not (is_head or name in self.linear) or (is_head and not quantisation.head):
            return None
        if rows < MIN_ROWS or columns < quantisation.block_size:
            return None
        if is_looked_up and not (is_head and columns % quantisation.block_size == 0):
            return None
        in_eight = is_head or is_sensitive(name, self.traced.num_layers, quantisation)
        return self._own(self.sources[name], is_out_first, HEAD_BITS if in_eight else quantisation.bits)

    def of_experts(self, recipe: Recipe, shape: tuple[int, ...]) -> MatrixSource | StoredSource:
        """What the experts of a layer are quantised from.

        Raises:
            OnnxError: they are quantised already, and the native model has them in another form.
        """
        if not self.quantisation.kept:
            return self._own(recipe, True, EXPERT_BITS)
        source = self._stored(recipe, shape)
        if source is None:
            raise OnnxError("the native model has the experts of this base in another form; use --dtype fp32")
        return source

    def _own(self, recipe: Recipe, is_out_first: bool, bits: int) -> MatrixSource:
        block_size, zero_points = self.quantisation.block_size, self.quantisation.zero_points
        return MatrixSource(uncast(recipe), is_out_first, bits, block_size, zero_points, self.traced.dtype)

    def _stored(self, recipe: Recipe, shape: tuple[int, ...]) -> StoredSource | None:
        layout = stored_layout(recipe, shape, self.weights)
        return None if layout is None else StoredSource(recipe, layout, self.traced.dtype)


def _linear_names(model: Any) -> set[str]:
    """Names of the weights of linear layers that are no routers."""
    from transformers.pytorch_utils import Conv1D

    routers = {
        f"{path}.{router}"
        for path, module in model.named_modules()
        if re.search(r"\.\d+$", path)
        for router in Routers.of(module).known
    }
    return {
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and path not in routers
    }


def _head_names(model: Any, sources: Mapping[str, Recipe]) -> set[str]:
    """The names of the head's weight: with a tied head, also the embedding's."""
    head = model.get_output_embeddings()
    (path,) = [path for path, module in model.named_modules() if module is head] or [None]
    recipe = sources.get(f"{path}.weight")
    if recipe is None:
        return set()
    stored = uncast(recipe).stored
    return {name for name, each in sources.items() if each is recipe or (stored and uncast(each).stored == stored)}


def _uses(weight: ir.Value) -> tuple[list[_Product], list[ir.Node]] | None:
    """The products by a weight, and the nodes that look up its rows; None if something else reads it."""
    products, look_ups = [], []
    for use in weight.uses():
        node = use.node
        if node.op_type == "Gather" and use.idx == 0 and node.attributes.get_int("axis", 0) == 0:
            look_ups.append(node)
        elif node.op_type == "Transpose" and all(_is_matmul(each.node, each.idx) for each in node.outputs[0].uses()):
            products += [_Product(each.node, True) for each in node.outputs[0].uses()]
        elif _is_matmul(node, use.idx):
            products.append(_Product(node, False))
        elif _is_plain_gemm(node, use.idx):
            products.append(_Product(node, bool(node.attributes.get_int("transB", 0))))
        else:
            return None
    if len({each.is_out_first for each in products}) != 1:
        return None
    return products, look_ups


def _is_matmul(node: ir.Node, index: int) -> bool:
    return node.op_type == "MatMul" and index == 1


def _is_plain_gemm(node: ir.Node, index: int) -> bool:
    return (
        node.op_type == "Gemm"
        and index == 1
        and not node.attributes.get_int("transA", 0)
        and all(node.attributes.get_float(name, 1.0) == number for name, number in _UNUSED_DEFAULTS.items())
    )


def _sizes(weight: ir.Value, is_out_first: bool) -> tuple[int, int]:
    assert weight.shape is not None
    first, second = weight.shape.numpy()
    return (first, second) if is_out_first else (second, first)


class _Replacement:
    """Puts the arrays of one weight into the graph, and the nodes that read them."""

    def __init__(
        self,
        graph: ir.Graph,
        name: str,
        source: MatrixSource | StoredSource,
        sizes: tuple[int, int],
        made: dict[str, Recipe | MatrixPart],
    ):
        self.graph, self.name, self.source, self.sizes, self.made = graph, name, source, sizes, made
        self.blocks = -(-sizes[1] // source.block_size)
        self.scale_type = SCALE_TYPES[source.scale_dtype]

    def replace(self, products: list[_Product], look_ups: list[ir.Node]) -> None:
        """Replace all uses of the weight."""
        rows, _ = self.sizes
        width = self.source.block_size * self.source.bits // 8
        codes = self._input("codes", "B", ir.DataType.UINT8, rows, self.blocks, width)
        others = [self._input("scales", "scales", self.scale_type, rows, self.blocks)]
        if self.source.zero_points:
            zeros = -(-self.blocks * self.source.bits // 8)
            others.append(self._input("zero_points", "zero_points", ir.DataType.UINT8, rows, zeros))
        for product in products:
            self._multiply(product.node, [codes, *others])
        for node in look_ups:
            self._look_up(node, others)

    def _input(self, suffix: str, part: str, dtype: ir.DataType, *shape: int) -> ir.Value:
        value = ir.Value(name=f"{self.name}.{suffix}", type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.made[str(value.name)] = MatrixPart(self.source, part)
        self.graph.inputs.append(value)
        return value

    def _multiply(self, node: ir.Node, arrays: list[ir.Value]) -> None:
        rows, columns = self.sizes
        sizes = {"K": columns, "N": rows, "bits": self.source.bits, "block_size": self.source.block_size}
        level = {"accuracy_level": ACCURACY_LEVEL} if self.source.scale_dtype == torch.float32 else {}
        attributes = {**sizes, **level}
        product = ir.node(PRODUCT, [node.inputs[0], *arrays], attributes, domain=DOMAIN)
        new = [product]
        if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
            new.append(ir.node("Add", [product.outputs[0], node.inputs[2]]))
        self._put(node, new)

    def _look_up(self, node: ir.Node, others: list[ir.Value]) -> None:
        """Read rows of the same bytes as the head; the arrays are as in the products, but codes are a matrix here."""
        codes = self._input("rows", "B", ir.DataType.UINT8, *self.sizes)
        attributes = {
            "bits": self.source.bits, "block_size": self.source.block_size, "gather_axis": 0, "quantize_axis": 1
        }  # fmt: skip
        scales, *zeros = others
        self._put(node, [ir.node(LOOK_UP, [codes, node.inputs[1], scales, *zeros], attributes, domain=DOMAIN)])

    def _put(self, old: ir.Node, new: list[ir.Node]) -> None:
        name = str(old.name)
        module, _, operator = name.rpartition("/")
        for each in new:
            each.name = f"{module}/{operator.replace(old.op_type, each.op_type)}".lstrip("/")
            each.outputs[0].name, each.outputs[0].type = each.name, old.outputs[0].type
        self.graph.insert_before(old, new)
        replace_value(old.outputs[0], new[-1].outputs[0])
        self.graph.remove(old, safe=True)
