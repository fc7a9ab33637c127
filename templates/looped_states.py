"""How the stand-ins of `looped_cache` answer recurrent layers: linear attention, state spaces and short convolutions.

Every export has a copy of this file. It needs only torch.

Such a layer keeps two kinds of state in the cache: a convolution state, the latest inputs of a short convolution
`(batch, channels, width)`, and a recurrent state, whose shape the family decides. It asks by layer number, and by
`state_idx` if it has several. A layer may change the state that it got in place.
"""

from __future__ import annotations

from typing import Any

import torch

# Attribute of cache slots of recurrent layers: whether each of their states has seen a token.
HAS_STATE = "has_previous_state"


class NoPast:
    """The cache of a recurrent layer in a model that runs without one: it has no past and stores nothing."""

    def get_conv_state(self, layer_idx, state_idx=0):
        return None

    def get_recurrent_state(self, layer_idx, state_idx=0):
        return None

    def update_conv_state(self, inputs, layer_idx, state_idx=0, **kwargs):
        return inputs

    def update_recurrent_state(self, state, layer_idx, state_idx=0, **kwargs):
        return state

    def is_recording_past(self, layer_idx):
        return False

    def has_previous_state(self, layer_idx=None, state_idx=None):
        return False


# The calls of recurrent layers that the stand-ins answer.
STATE_CALLS = tuple(name for name in vars(NoPast) if not name.startswith("_"))


class NaturalStates:
    """What the recurrent layers of one `LayerCall` read in the natural pass.

    Attributes:
        conv, recurrent: by `state_idx`, copies of the states before this chunk; None for a state without a past.
        mixers: with `shared`, what `looped_recurrent` recorded of each mixer, by its path in the layer.
    """

    def __init__(self):
        self.conv: dict[int, Any] = {}
        self.recurrent: dict[int, Any] = {}
        self.mixers: dict[str, Any] = {}

    def __bool__(self):
        return bool(self.conv or self.recurrent)


class RecordStates:
    """For the natural pass: uses the real cache, and keeps the states from before this chunk."""

    ask: Any
    states: NaturalStates

    def get_conv_state(self, layer_idx, state_idx=0):
        return _kept(self.states.conv, state_idx, self.ask("get_conv_state", layer_idx, state_idx))

    def get_recurrent_state(self, layer_idx, state_idx=0):
        return _kept(self.states.recurrent, state_idx, self.ask("get_recurrent_state", layer_idx, state_idx))


class NaturalPast:
    """Policy `reference`: the natural states from before this chunk, and the iterate's own chunk; stores nothing."""

    states: NaturalStates

    def get_conv_state(self, layer_idx, state_idx=0):
        return _copy(self.states.conv.get(state_idx))

    def get_recurrent_state(self, layer_idx, state_idx=0):
        return _copy(self.states.recurrent.get(state_idx))

    def update_conv_state(self, inputs, layer_idx, state_idx=0, **kwargs):
        before = self.states.conv.get(state_idx)
        return inputs if before is None else torch.cat([before, inputs], dim=-1)

    def update_recurrent_state(self, state, layer_idx, state_idx=0, **kwargs):
        return state


class NaturalPresent(NaturalPast):
    """Policy `shared`: as `NaturalPast`, but `looped_recurrent` sees to the convolution.

    Without a convolution state, a mixer passes all tokens of a chunk to one kernel, also if there is only one.
    """

    def get_conv_state(self, layer_idx, state_idx=0):
        return None

    def update_conv_state(self, inputs, layer_idx, state_idx=0, **kwargs):
        return inputs


class OwnStates:
    """Policy `per_step`: the states in the slot of this layer and iteration."""

    ask: Any
    slot: int

    def get_conv_state(self, layer_idx, state_idx=0):
        return self.ask("get_conv_state", self.slot, state_idx)

    def get_recurrent_state(self, layer_idx, state_idx=0):
        return self.ask("get_recurrent_state", self.slot, state_idx)

    def update_conv_state(self, inputs, layer_idx, state_idx=0, **kwargs):
        return self.ask("update_conv_state", inputs, self.slot, state_idx, **kwargs)

    def update_recurrent_state(self, state, layer_idx, state_idx=0, **kwargs):
        return self.ask("update_recurrent_state", state, self.slot, state_idx, **kwargs)

    def is_recording_past(self, layer_idx):
        return self.ask("is_recording_past", self.slot)

    def has_previous_state(self, layer_idx=None, state_idx=None):
        return self.ask("has_previous_state", self.slot, state_idx)


def has_past(slot) -> bool:
    """Whether a cache slot of a recurrent layer has seen a token."""
    return any(getattr(slot, HAS_STATE).values())


def _kept(kept: dict[int, Any], state_idx: int, state):
    kept[state_idx] = _copy(state)
    return state


def _copy(state):
    return None if state is None else state.clone()
