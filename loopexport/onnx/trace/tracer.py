"""Trace the native model once, without weights, into a graph in which the decoder layers are marked.

`unroll` makes the graph of every K, K/V policy and rule from this one: an iteration is a copy of a layer's nodes.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from transformers import Cache

from loopexport.errors import OnnxError
from loopexport.templates.looped_arguments import find_cache_argument
from loopexport.templates.modeling_looped import find_layers

from .attention import ATTENTION, WINDOWS, FusedSlot, TracedSlot
from .last_logits import add_num_logits, marked_head
from .marks import LAYER_INPUT, is_mark, marked
from .refusals import family_refused
from .repeat import NotRepeatableError, Repeats
from .rope import stateless_rope
from .simplify import simplify
from .skeleton import Skeleton
from .substitutes import OnnxSubstitutes
from .translate import translate

# Sizes of the example inputs. All differ, so that torch cannot take two dimensions for one.
BATCH, SEQUENCE, PAST = 2, 3, 5


@dataclass(frozen=True)
class Traced:
    """The marked graph of a native model.

    Attributes:
        model: inputs `input_ids`, `attention_mask`, `position_ids` if the family takes them, then
            `past_key_values.N.key` and `.value`, the weights, and `num_logits_to_keep`; outputs `logits`, then
            `present.N.key` and `.value`.
        num_slots: number of cache slots.
        num_layers: L; more than `num_slots` if layers reuse the keys of other layers.
        hidden_size, dtype: of the hidden states.
    """

    model: ir.Model
    num_slots: int
    num_layers: int
    hidden_size: int
    dtype: torch.dtype


def trace(skeleton: Skeleton) -> Traced:
    """Trace a model: two layers of each kind if the others are copies of them, else all layers.

    Raises:
        OnnxError: the family cannot be traced; the message says why.
    """
    model: Any = skeleton.model
    decoder, list_name = find_layers(model.base_model, model.config.num_hidden_layers)
    layers = list(getattr(decoder, list_name))
    with skeleton.fake_mode, family_refused(model), stateless_rope(model):
        inputs = _example_inputs(model)
        slots = _slot_shapes(model, inputs)
    repeats = Repeats(model, layers)
    try:
        return _traced(skeleton, layers, slots, repeats)
    except NotRepeatableError:
        return _traced(skeleton, layers, slots, Repeats(model, ()))


def _traced(skeleton: Skeleton, layers: list[nn.Module], slots: list[tuple[int, int]], repeats: Repeats) -> Traced:
    model: Any = skeleton.model
    dtype = model.dtype
    windows: set[int | None] = set()
    WINDOWS.set(windows)
    with (
        family_refused(model), stateless_rope(model), marked(layers), marked_head(model), repeats.placeholders(),
        torch.no_grad(),
    ):  # fmt: skip
        inputs = _example_inputs(model)
        past = [torch.zeros(BATCH, heads, PAST, size, dtype=dtype) for heads, size in slots]
        program = torch.export.export(
            _Traceable(model), (inputs, past), dynamic_shapes=_dynamic_shapes(inputs, past), strict=False
        )
        _check_windows(model, windows)
        graph_model = translate(program)
    _name_inputs_and_outputs(graph_model.graph, list(inputs))
    hidden_size = _hidden_size(graph_model.graph)
    simplify(graph_model, skeleton.recipes)
    repeats.fill(graph_model.graph, skeleton.recipes)
    add_num_logits(graph_model.graph)
    return Traced(graph_model, len(slots) // 2, len(layers), hidden_size, dtype)


class _Traceable(nn.Module):
    """The native model as a function of tensors: the K/V cache goes in and out as a flat list."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.is_fused = model.config._attn_implementation == ATTENTION["gqa"]

    def forward(self, inputs: dict[str, torch.Tensor], past: list[torch.Tensor]):
        """Logits, `(batch, seq, vocab)`, and the cache's keys and values in the order of `past`."""
        slots = self._slots(past, inputs["attention_mask"])
        cache = Cache(layers=slots)
        with OnnxSubstitutes():
            logits = _run(self.model, inputs, cache).logits
        if logits.dtype == torch.bfloat16:  # numpy, and so every caller in Python, has no bfloat16
            logits = logits.float()
        return logits, [each for slot in slots for each in (slot.keys, slot.values)]

    def _slots(self, past: list[torch.Tensor], mask: torch.Tensor) -> list[Any]:
        pairs = list(zip(past[::2], past[1::2], strict=True))
        if not self.is_fused:
            return [TracedSlot(index, *pair) for index, pair in enumerate(pairs)]
        lengths, total = (mask.sum(-1) - 1).to(torch.int32), torch.tensor(mask.shape[1], dtype=torch.int32)
        return [FusedSlot(index, *pair, lengths, total) for index, pair in enumerate(pairs)]


def _run(model: nn.Module, inputs: dict[str, torch.Tensor], cache):
    argument = find_cache_argument(model)
    if argument is None:
        raise OnnxError(f"{type(model).__name__} takes no K/V cache, so a graph cannot pass one in and out")
    return model(**inputs, **{argument[0]: cache}, use_cache=True)


def _example_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    accepted = inspect.signature(model.forward).parameters
    inputs = {
        "input_ids": torch.ones(BATCH, SEQUENCE, dtype=torch.int64),
        "attention_mask": torch.ones(BATCH, PAST + SEQUENCE, dtype=torch.int64),
        "position_ids": torch.arange(PAST, PAST + SEQUENCE).repeat(BATCH, 1),
    }
    return {name: tensor for name, tensor in inputs.items() if name in accepted}


def _slot_shapes(model: Any, inputs: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
    """`(heads, head_size)` of the keys and of the values of each cache slot, from a run: configs differ too much."""
    from transformers import DynamicCache

    first = {**inputs, "attention_mask": inputs["attention_mask"][:, PAST:]}
    cache = DynamicCache()
    chosen = model.config._attn_implementation
    if chosen == ATTENTION["gqa"]:
        model.config._attn_implementation = ATTENTION["portable"]
    _run(model, first, cache)
    model.config._attn_implementation = chosen
    shapes = []
    for slot in cache.layers:
        for tensor in (getattr(slot, "keys", None), getattr(slot, "values", None)):
            if not isinstance(tensor, torch.Tensor) or tensor.dim() != 4:
                raise OnnxError(
                    f"{type(model).__name__} caches more than keys and values, for which an ONNX graph has no input"
                )
            shapes.append((tensor.shape[1], tensor.shape[3]))
    return shapes


def _check_windows(model: Any, windows: set[int | None]) -> None:
    """Raise OnnxError if torch's cache drops keys that a graph, which keeps all of them, would still attend to."""
    from transformers import DynamicCache

    slots: list[Any] = DynamicCache(config=model.config).layers
    kept = {slot.sliding_window for slot in slots if getattr(slot, "is_sliding", False)}
    if kept - windows:
        raise OnnxError(
            f"family {model.config.model_type!r} cannot be traced to ONNX: its cache forgets all but the last "
            f"{min(kept - windows)} tokens, and no mask of its code says so"
        )


def _dynamic_shapes(inputs, past):
    batch, sequence = torch.export.Dim("batch", min=1), torch.export.Dim("sequence", min=1)
    length = torch.export.Dim("past")
    total = torch.export.Dim.AUTO  # torch finds out that it is past + sequence
    return {
        "inputs": {name: {0: batch, 1: total if name == "attention_mask" else sequence} for name in inputs},
        "past": [{0: batch, 2: length} for _ in past],
    }


def _name_inputs_and_outputs(graph: ir.Graph, names: list[str]) -> None:
    num_slots = (len(graph.inputs) - len(names)) // 2
    slots = [f"{slot}.{part}" for slot in range(num_slots) for part in ("key", "value")]
    for value, name in zip(graph.inputs, [*names, *(f"past_key_values.{each}" for each in slots)], strict=True):
        value.name = name
    for value, name in zip(graph.outputs, ["logits", *(f"present.{each}" for each in slots)], strict=True):
        value.name = name


def _hidden_size(graph: ir.Graph) -> int:
    first = next(node for node in graph if is_mark(node, LAYER_INPUT))
    shape = first.outputs[0].shape
    assert shape is not None
    size = shape[-1]
    assert isinstance(size, int)
    return size
