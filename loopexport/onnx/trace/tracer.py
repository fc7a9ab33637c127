"""Trace the native model once, without weights, into a graph whose decoder layers are marked.

Every K, K/V policy and rule is made of this one graph by `unroll`: an iteration is a copy of a layer's nodes.
"""

from __future__ import annotations

import inspect
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from transformers import Cache

from loopexport.errors import OnnxError, one_line
from loopexport.templates.looped_cache import find_cache_argument
from loopexport.templates.looped_routing import Routers
from loopexport.templates.modeling_looped import layer_list

from .attention import ATTENTION, OPSET, WINDOWS, FusedSlot, TracedSlot
from .expressible import Expressible
from .marks import LAYER_INPUT, LAYER_OUTPUT, ROUTE, is_mark, mark
from .repeat import NotRepeatableError, Repeats
from .rope import stateless_rope
from .simplify import simplify
from .skeleton import Skeleton

# Sizes of the example inputs, distinct so that no two dimensions are taken for one.
BATCH, SEQUENCE, PAST = 2, 3, 5


@dataclass(frozen=True)
class Traced:
    """The marked graph of a native model.

    Attributes:
        model: inputs `input_ids`, `attention_mask`, and `position_ids` where the family takes them, then
            `past_key_values.N.key` and `.value`; outputs `logits`, then `present.N.key` and `.value`.
        num_slots: number of cache slots.
        num_layers: L; more than `num_slots` where layers reuse the keys of others.
        hidden_size, dtype: of the hidden states.
    """

    model: ir.Model
    num_slots: int
    num_layers: int
    hidden_size: int
    dtype: torch.dtype


class _Traceable(nn.Module):
    """The native model as a function of tensors: its K/V cache comes in and goes out as a flat list."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.is_fused = model.config._attn_implementation == ATTENTION["gqa"]

    def forward(self, inputs: dict[str, torch.Tensor], past: list[torch.Tensor]):
        """Logits, and the cache's keys and values in the order of `past`."""
        slots = self._slots(past, inputs["attention_mask"])
        cache = Cache(layers=slots)
        with Expressible():
            logits = _run(self.model, inputs, cache).logits
        if logits.dtype == torch.bfloat16:  # which numpy, and so every caller in Python, cannot hold
            logits = logits.float()
        return logits, [each for slot in slots for each in (slot.keys, slot.values)]

    def _slots(self, past: list[torch.Tensor], mask: torch.Tensor) -> list[Any]:
        pairs = list(zip(past[::2], past[1::2], strict=True))
        if not self.is_fused:
            return [TracedSlot(index, *pair) for index, pair in enumerate(pairs)]
        lengths, total = (mask.sum(-1) - 1).to(torch.int32), torch.tensor(mask.shape[1], dtype=torch.int32)
        return [FusedSlot(index, *pair, lengths, total) for index, pair in enumerate(pairs)]


@contextmanager
def _marked(model: nn.Module, layers: Sequence[nn.Module]) -> Iterator[None]:
    """Mark what goes into and comes out of each decoder layer, and what its routers answer."""
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
        yield layer.get_submodule(path).register_forward_hook(lambda module, args, answer: _mark_route(index, answer))


def _mark_route(index: int, answer):
    if isinstance(answer, (tuple, list)):
        return type(answer)(_mark_route(index, each) for each in answer)
    return mark(ROUTE, answer, layer=index) if isinstance(answer, torch.Tensor) else answer


# ---------------------------------------------------------------------------------------------------------------------
# The trace.
# ---------------------------------------------------------------------------------------------------------------------


def trace(skeleton: Skeleton) -> Traced:
    """Trace the model of a skeleton: a layer of each kind where the others are copies of it, else all.

    Raises:
        OnnxError: the family cannot be traced, for the reason that the message gives.
    """
    model: Any = skeleton.model
    layers = list(layer_list(model.base_model, model.config.num_hidden_layers))
    with skeleton.fake_mode, _family_explained(model), stateless_rope(model):
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
        _family_explained(model), stateless_rope(model), _marked(model, layers), repeats.standing_in(), torch.no_grad()
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
    repeats.expand(graph_model.graph, skeleton.recipes)
    return Traced(graph_model, len(slots) // 2, len(layers), hidden_size, dtype)


def _run(model: nn.Module, inputs: dict[str, torch.Tensor], cache):
    argument = find_cache_argument(model)
    if argument is None:
        raise OnnxError(f"{type(model).__name__} takes no K/V cache, so that none can go in and out of a graph")
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
    """For the keys and the values of each cache slot, `(heads, size)`: asked of a run, since families differ."""
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
                raise OnnxError(f"{type(model).__name__} keeps more than keys and values in its cache")
            shapes.append((tensor.shape[1], tensor.shape[3]))
    return shapes


def _check_windows(model: Any, windows: set[int | None]) -> None:
    """Raise OnnxError where torch's cache forgets what a graph, which keeps all keys, would go on attending to."""
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
    total = torch.export.Dim.AUTO  # past and sequence: torch finds out
    return {
        "inputs": {name: {0: batch, 1: total if name == "attention_mask" else sequence} for name in inputs},
        "past": [{0: batch, 2: length} for _ in past],
    }


def translate(program) -> ir.Model:
    """An exported program as a graph, just as it stands."""
    from .arithmetic import TRANSLATIONS

    with _quiet():
        translated = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            custom_translation_table=TRANSLATIONS,
            verbose=False,
        )
    assert translated is not None
    return translated.model


@contextmanager
def _quiet() -> Iterator[None]:
    """torch tells about operators of packages that are not installed, and of its own plans."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


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


# Errors of torch where the course of the code depends on a tensor's values.
_DATA_DEPENDENT = ("DataDependentOutputException", "DynamicOutputShapeException")


@contextmanager
def _family_explained(model: Any) -> Iterator[None]:
    """Anything that goes wrong while a family's own code is traced is the family's limit, not a bug to show."""
    try:
        yield
    except (OnnxError, NotRepeatableError):
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # the outer ones only say in which step it happened
            cause = cause.__cause__
        raise OnnxError(f"family {model.config.model_type!r} cannot be traced to ONNX: {_reason(cause)}") from error


def _reason(cause: BaseException) -> str:
    """In plain words, where torch would speak of itself."""
    text = one_line(cause)
    if "Constraints violated" in text:
        return "its code takes different paths for different numbers of tokens, of which a graph holds one"
    if "data-dependent" in text or type(cause).__name__ in _DATA_DEPENDENT:
        return "what its code does depends on values that it computed, and a graph does the same for all"
    operator = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", text)
    if operator:
        return f"ONNX has no {operator[1]}"
    return f"{type(cause).__name__}: {text[:300]}"
