"""Attention and its cache while a model is traced: what stands in for those of transformers, in each layout."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import sdpa_mask

from loopexport.errors import OnnxError

from .marks import READ, mark

OPSET = 23
# Our entries in the registries of transformers, by attention layout.
ATTENTION = {"portable": "loopexport_onnx", "gqa": "loopexport_onnx_gqa"}
FUSED_DOMAIN, FUSED = "com.microsoft", "GroupQueryAttention"


class TracedSlot(DynamicLayer):
    """A cache slot that never branches on how much it holds, and marks what attention reads."""

    def __init__(self, index: int, keys, values):
        super().__init__()
        self.index = index
        self.keys: torch.Tensor
        self.values: torch.Tensor
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        """Join past and new, and mark both."""
        self.keys = mark(READ, torch.cat([self.keys, key_states], dim=-2), slot=self.index, value=0)
        self.values = mark(READ, torch.cat([self.values, value_states], dim=-2), slot=self.index, value=1)
        return self.keys, self.values

    def get_seq_length(self, *args) -> int:
        """Positions held; `DynamicLayer` asks whether there are any, which a graph cannot branch on."""
        return self.keys.shape[-2]


# Windows that the model under trace was seen to keep to, in its masks or in what it told its attention.
WINDOWS: ContextVar[set[int | None]] = ContextVar("windows")


def _additive_mask(*args, dtype=torch.float32, **kwargs):
    """The mask that is added to scores.

    Half of the lowest number, since a score added to the lowest overflows in fp16; and not minus infinity, since a row
    of a padded token sees nothing, and a softmax over nothing is NaN, which later rows would read.
    """
    WINDOWS.get(set()).add(kwargs.get("local_size"))
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    allowed = sdpa_mask(*args, **kwargs)
    assert allowed is not None
    lowest = torch.tensor(torch.finfo(dtype).min / 2, dtype=dtype)
    return torch.where(allowed, torch.tensor(0.0, dtype=dtype), lowest)


def _attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, softcap=None, s_aux=None, **kwargs):
    """One `Attention` node, `(batch, heads, seq, dim)`; spelled out for soft-capped scores and for sinks.

    The operator of opset 23 caps the scores after the mask is added, where the models cap before.
    """
    if softcap is None and s_aux is None:
        output = _attention_node(query, key, value, attention_mask, scaling)
    else:
        output = _attend_spelled_out(query, key, value, attention_mask, scaling, softcap, s_aux)
    return output.transpose(1, 2).contiguous(), None


def _attention_node(query, key, value, attention_mask, scaling) -> torch.Tensor:
    """`torch.onnx.ops.attention` would take values to be as wide as keys, which those of MLA are not."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    shape = (*query.shape[:-1], value.shape[-1])
    inputs = (query, key, value, attention_mask)
    return torch.onnx.ops.symbolic(
        "Attention", inputs, {"scale": float(scale)}, dtype=query.dtype, shape=shape, version=OPSET
    )


def _attend_spelled_out(query, key, value, attention_mask, scaling, softcap, sinks):
    batch, heads, length, _ = query.shape
    groups = heads // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) if groups > 1 else each for each in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = (scores if attention_mask is None else scores + attention_mask).float()
    if sinks is None:
        return scores.softmax(-1).to(query.dtype) @ value
    sink_scores = sinks.float().reshape(1, -1, 1, 1).expand(batch, -1, length, 1)
    weights = torch.cat([scores, sink_scores], dim=-1).softmax(-1)[..., :-1]
    return weights.to(query.dtype) @ value


class FusedSlot(TracedSlot):
    """A cache slot that the attention node itself joins with what is new.

    Attributes:
        lengths: of each row, its last position, int32; `total` is that of the longest row, plus 1.
    """

    def __init__(self, index: int, keys, values, lengths: torch.Tensor, total: torch.Tensor):
        super().__init__(index, keys, values)
        self.lengths, self.total = lengths, total

    def update(self, key_states, value_states, *args, **kwargs):
        """What is new, tied to this slot for the attention that follows."""
        key_states.loop_slot = self
        return key_states, value_states

    def attend(self, query, key, value, **attributes) -> torch.Tensor:
        """One `GroupQueryAttention`; sets and marks what the slot then holds."""
        flat = [each.transpose(1, 2).flatten(2) for each in (query, key, value)]
        held = [(*each.shape[:2], each.shape[2] + key.shape[2], each.shape[3]) for each in (self.keys, self.values)]
        attrs = {"num_heads": query.shape[1], "kv_num_heads": key.shape[1], **attributes}
        output, keys, values = torch.onnx.ops.symbolic_multi_out(
            f"{FUSED_DOMAIN}::{FUSED}",
            (*flat, self.keys, self.values, self.lengths, self.total),
            attrs,
            dtypes=(query.dtype,) * 3,
            shapes=(flat[0].shape, *held),
            version=1,
        )
        self.keys = mark(READ, keys, slot=self.index, value=0)
        self.values = mark(READ, values, slot=self.index, value=1)
        return output.unflatten(-1, (query.shape[1], -1))


def _attend_fused(module, query, key, value, attention_mask, scaling=None, dropout=0.0, softcap=None, **kwargs):
    slot = getattr(key, "loop_slot", None)
    if slot is None:
        raise OnnxError(f"{type(module).__name__} changes keys behind the cache; use --attention portable")
    if key.shape[-1] != value.shape[-1] or kwargs.get("s_aux") is not None:
        raise OnnxError(
            f"GroupQueryAttention has no {'sinks' if kwargs.get('s_aux') is not None else 'values of another width'}, "
            f"which {type(module).__name__} needs; use --attention portable"
        )
    attributes: dict[str, Any] = {"scale": float(query.shape[-1] ** -0.5 if scaling is None else scaling)}
    if kwargs.get("sliding_window"):
        WINDOWS.get(set()).add(kwargs["sliding_window"])
        attributes["local_window_size"] = kwargs["sliding_window"]
    if softcap is not None:
        attributes["softcap"] = float(softcap)
    return slot.attend(query, key, value, **attributes), None


def register() -> None:
    """Enter our attentions into the registries of transformers, and the portable one's mask; the fused has none."""
    AttentionInterface.register(ATTENTION["portable"], _attend)
    AttentionMaskInterface.register(ATTENTION["portable"], _additive_mask)
    AttentionInterface.register(ATTENTION["gqa"], _attend_fused)
