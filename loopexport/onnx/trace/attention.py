"""Attention functions and cache slots that transformers uses during a trace, in two layouts.

portable    one `Attention` node; past and new keys are joined before it
gqa         one `GroupQueryAttention` node, which joins past and new keys itself
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import sdpa_mask

from loopexport.errors import OnnxError

from .marks import READ, mark
from .translate import OPSET

# By attention layout, the name of our function in the registries of transformers.
ATTENTION = {"portable": "loopexport_onnx", "gqa": "loopexport_onnx_gqa"}
FUSED_DOMAIN, FUSED = "com.microsoft", "GroupQueryAttention"

# Sliding windows that the traced code applies, in its masks or in its calls of attention.
WINDOWS: ContextVar[set[int | None]] = ContextVar("windows")


def register() -> None:
    """Register both attention layouts with transformers, and the portable layout's mask; the fused one needs none."""
    AttentionInterface.register(ATTENTION["portable"], _attend)
    AttentionMaskInterface.register(ATTENTION["portable"], _additive_mask)
    AttentionInterface.register(ATTENTION["gqa"], _attend_fused)


# ---------------------------------------------------------------------------------------------------------------------
# The portable layout.
# ---------------------------------------------------------------------------------------------------------------------


class TracedSlot(DynamicLayer):
    """A cache slot that never branches on its length, and marks what attention reads.

    Args:
        index: the slot's number.
        keys, values: the past, `(batch, kv_heads, past, head_size)`.
    """

    def __init__(self, index: int, keys, values):
        super().__init__()
        self.index = index
        self.keys: torch.Tensor
        self.values: torch.Tensor
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        """Join past and new keys and values, `(batch, kv_heads, past + seq, head_size)`, and mark both."""
        self.keys = mark(READ, torch.cat([self.keys, key_states], dim=-2), slot=self.index, value=0)
        self.values = mark(READ, torch.cat([self.values, value_states], dim=-2), slot=self.index, value=1)
        return self.keys, self.values

    def get_seq_length(self, *args) -> int:
        """Number of positions in the slot; `DynamicLayer` branches on whether it is 0, which a graph cannot do."""
        return self.keys.shape[-2]


def _additive_mask(*args, dtype=torch.float32, **kwargs):
    """The mask that attention adds to the scores.

    Masked entries are half of the lowest number, because a score plus the lowest number overflows in fp16. They are not
    minus infinity, because a padded row sees nothing: its softmax would be NaN, and later rows read it.
    """
    WINDOWS.get(set()).add(kwargs.get("local_size"))
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    allowed = sdpa_mask(*args, **kwargs)
    assert allowed is not None
    lowest = torch.tensor(torch.finfo(dtype).min / 2, dtype=dtype)
    return torch.where(allowed, torch.tensor(0.0, dtype=dtype), lowest)


def _attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, softcap=None, s_aux=None, **kwargs):
    """Attention as one `Attention` node; as single operations for capped scores and for sinks.

    The `Attention` of opset 23 caps the scores after adding the mask; the models cap them before.

    Args:
        query, key, value: `(batch, heads, seq, head_size)`.

    Returns:
        `(batch, seq, heads, head_size)`, and None in place of the weights.
    """
    if softcap is None and s_aux is None:
        output = _attention_node(query, key, value, attention_mask, scaling)
    else:
        output = _attend_in_single_operations(query, key, value, attention_mask, scaling, softcap, s_aux)
    return output.transpose(1, 2).contiguous(), None


def _attention_node(query, key, value, attention_mask, scaling) -> torch.Tensor:
    """Built by hand: `torch.onnx.ops.attention` assumes that values are as wide as keys, which is not so in MLA."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    shape = (*query.shape[:-1], value.shape[-1])
    inputs = (query, key, value, attention_mask)
    return torch.onnx.ops.symbolic(
        "Attention", inputs, {"scale": float(scale)}, dtype=query.dtype, shape=shape, version=OPSET
    )


def _attend_in_single_operations(query, key, value, attention_mask, scaling, softcap, sinks):
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


# ---------------------------------------------------------------------------------------------------------------------
# The fused layout.
# ---------------------------------------------------------------------------------------------------------------------


class FusedSlot(TracedSlot):
    """A cache slot whose past the attention node itself joins with the new keys and values.

    Args:
        index, keys, values: see `TracedSlot`.
        lengths: the last position of each row, int32, `(batch,)`.
        total: the last position of the longest row, plus 1, int32, a scalar.
    """

    def __init__(self, index: int, keys, values, lengths: torch.Tensor, total: torch.Tensor):
        super().__init__(index, keys, values)
        self.lengths, self.total = lengths, total

    def update(self, key_states, value_states, *args, **kwargs):
        """The new keys and values alone; the keys carry this slot to the attention function."""
        key_states.loop_slot = self
        return key_states, value_states

    def attend(self, query, key, value, **attributes) -> torch.Tensor:
        """Add one `GroupQueryAttention`, and mark what the slot holds after it."""
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
    name = type(module).__name__
    if slot is None:
        raise OnnxError(f"{name} changes keys after it stored them in the cache; use --attention portable")
    if key.shape[-1] != value.shape[-1] or kwargs.get("s_aux") is not None:
        feature = "sinks" if kwargs.get("s_aux") is not None else "values of another width than its keys"
        raise OnnxError(f"GroupQueryAttention has no {feature}, which {name} needs; use --attention portable")
    attributes: dict[str, Any] = {"scale": float(query.shape[-1] ** -0.5 if scaling is None else scaling)}
    if kwargs.get("sliding_window"):
        WINDOWS.get(set()).add(kwargs["sliding_window"])
        attributes["local_window_size"] = kwargs["sliding_window"]
    if softcap is not None:
        attributes["softcap"] = float(softcap)
    return slot.attend(query, key, value, **attributes), None
