"""One kernel alone: GroupQueryAttention that reads the cache of another and adds no keys, as iterations do.

The graph has a natural pass, which stores its keys and values, and an iteration, which passes zero-length ones and
reads what the natural pass stored. Numpy in fp64 computes both. The natural pass is measured first: its error is the
kernel's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from .bases import DTYPES
from .results import Result, attempt, compared, short
from .scale import Scale
from .sessions import run_once, session
from .torch_exactness import FLOORS, allowed

HEADS, KV_HEADS = 4, 2
ELEMENT = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16, "fp32": TensorProto.FLOAT}
assert set(ELEMENT) == set(DTYPES) == set(FLOORS)


@dataclass(frozen=True)
class Shape:
    """Sizes of one case.

    Attributes:
        batch: rows.
        past, new: cached and new positions.
        size: of a head.
    """

    batch: int
    past: int
    new: int
    size: int

    def __str__(self):
        return f"batch {self.batch}, {self.new} after {self.past}, heads of {self.size}"


# Several new tokens after a cache are for one row alone, which is the kernel's own limit.
SHAPES = (Shape(1, 0, 37, 64), Shape(1, 130, 1, 64), Shape(3, 130, 1, 128), Shape(2, 0, 200, 128), Shape(1, 40, 5, 128))
OUTPUTS = {"without outputs for the cache": False, "with outputs for the cache": True}


def shared_reads(scale: Scale) -> Iterator[Result]:
    """Each number format, and each size, with both forms of the reading node."""
    dtypes = scale.half if scale.device == "cuda" else ("fp32", *scale.half)
    for dtype, shape, (form, has_outputs) in itertools.product(dtypes, SHAPES, OUTPUTS.items()):

        def case(dtype=dtype, shape=shape, has_outputs=has_outputs) -> Result:
            return _case(dtype, shape, has_outputs, scale.provider)

        yield attempt(f"{dtype}, {shape}, {form}", case)


def _case(dtype: str, shape: Shape, has_outputs: bool, provider: str) -> Result:
    feeds = make_feeds(shape, dtype)
    made = session(make_graph(shape, dtype, has_outputs).SerializeToString(), provider)
    outputs = dict(zip(("natural", "iteration", "keys", "values"), run_once(made, feeds), strict=True))
    keys, values = (np.concatenate([feeds[f"past_{name}"], _heads(feeds[name], shape)], axis=2) for name in "kv")
    if not (np.array_equal(outputs["keys"], keys) and np.array_equal(outputs["values"], values)):
        raise AssertionError("the natural pass did not store its keys and values")
    scale = max(float(np.abs(attend(feeds[name], keys, values, shape)).max()) for name in ("q", "q_iteration"))
    natural = float(np.abs(outputs["natural"] - attend(feeds["q"], keys, values, shape)).max()) / scale
    iteration = float(np.abs(outputs["iteration"] - attend(feeds["q_iteration"], keys, values, shape)).max()) / scale
    return compared(iteration, allowed(natural, dtype), base=short(natural))


def make_feeds(shape: Shape, dtype: str) -> dict[str, np.ndarray]:
    """Random inputs in fp32 whose values the number format holds exactly."""
    import torch

    random = np.random.default_rng(0)
    width = KV_HEADS * shape.size
    past = (shape.batch, KV_HEADS, shape.past, shape.size)
    sizes = {
        "q": (shape.batch, shape.new, HEADS * shape.size),
        "k": (shape.batch, shape.new, width),
        "v": (shape.batch, shape.new, width),
        "past_k": past,
        "past_v": past,
        "q_iteration": (shape.batch, shape.new, HEADS * shape.size),
    }
    exact = {name: torch.from_numpy(random.standard_normal(size)).to(DTYPES[dtype]) for name, size in sizes.items()}
    feeds = {name: tensor.float().numpy() for name, tensor in exact.items()}
    total = shape.past + shape.new
    return {**feeds, "lengths": np.full(shape.batch, total - 1, np.int32), "total": np.array(total, np.int32)}


def make_graph(shape: Shape, dtype: str, has_outputs: bool) -> onnx.ModelProto:
    """The natural pass and the iteration; all inputs and outputs are in fp32."""
    element = ELEMENT[dtype]
    names = ("q", "k", "v", "past_k", "past_v", "q_iteration")
    nodes = [helper.make_node("Cast", [name], [f"{name}_half"], to=element) for name in names]
    for name in "kv":
        nodes.append(helper.make_node("Slice", [f"{name}_half", "zero", "zero", "one"], [f"{name}_none"]))
    nodes.append(_attention(shape, "q_half", "k_half", "v_half", "past_k_half", "past_v_half", "natural", "natural"))
    nodes.append(
        _attention(
            shape, "q_iteration_half", "k_none", "v_none", "natural_k", "natural_v", "iteration",
            "iteration" if has_outputs else "",
        )
    )  # fmt: skip
    outputs = {"natural": "natural_half", "iteration": "iteration_half", "keys": "natural_k", "values": "natural_v"}
    nodes += [helper.make_node("Cast", [value], [name], to=TensorProto.FLOAT) for name, value in outputs.items()]
    feeds = make_feeds(shape, dtype)
    kinds = {"lengths": TensorProto.INT32, "total": TensorProto.INT32}
    inputs = [
        helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), each.shape)
        for name, each in feeds.items()
    ]
    graph = helper.make_graph(
        nodes,
        "shared read",
        inputs,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [helper.make_tensor(name, TensorProto.INT64, [1], [value]) for name, value in (("zero", 0), ("one", 1))],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _attention(shape: Shape, query: str, key: str, value: str, past_k: str, past_v: str, name: str, cache: str):
    outputs = [f"{name}_half", *([f"{cache}_k", f"{cache}_v"] if cache else [])]
    return helper.make_node(
        "GroupQueryAttention",
        [query, key, value, past_k, past_v, "lengths", "total"],
        outputs,
        domain="com.microsoft",
        num_heads=HEADS,
        kv_num_heads=KV_HEADS,
        scale=float(shape.size**-0.5),
    )


def attend(query: np.ndarray, keys: np.ndarray, values: np.ndarray, shape: Shape) -> np.ndarray:
    """Causal attention in fp64.

    Args:
        query: `(batch, new, heads * size)`.
        keys, values: `(batch, kv_heads, past + new, size)`.
        shape: the sizes.

    Returns:
        `(batch, new, heads * size)`.
    """
    rows = query.astype(np.float64).reshape(shape.batch, shape.new, HEADS, shape.size).transpose(0, 2, 1, 3)
    keys, values = (each.astype(np.float64).repeat(HEADS // KV_HEADS, axis=1) for each in (keys, values))
    scores = rows @ keys.transpose(0, 1, 3, 2) * shape.size**-0.5
    hidden = np.arange(shape.past + shape.new) > shape.past + np.arange(shape.new)[:, None]
    weights = np.exp(np.where(hidden, -np.inf, scores - scores.max(-1, keepdims=True)))
    return ((weights / weights.sum(-1, keepdims=True)) @ values).transpose(0, 2, 1, 3).reshape(query.shape)


def _heads(flat: np.ndarray, shape: Shape) -> np.ndarray:
    return flat.reshape(shape.batch, shape.new, KV_HEADS, shape.size).transpose(0, 2, 1, 3)
