"""Make rotary embeddings functions of the positions alone, where their frequencies depend on the length.

The modules of transformers keep the frequencies for the longest input so far; a graph has no place for such a state.
Type longrope has two sets of frequencies and chooses by length. Type dynamic stretches its frequencies beyond the
trained length.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn


@contextmanager
def stateless_rope(model: nn.Module) -> Iterator[None]:
    """While active, the model's rotary embeddings compute their frequencies in each call."""
    changed = [module for module in model.modules() if _has_state(module)]
    for module in changed:
        vars(module)["forward"] = partial(_forward, module)
    try:
        yield
    finally:
        for module in changed:
            del vars(module)["forward"]


def recomputed_beyond(model: nn.Module) -> int | None:
    """The length beyond which a native model's `generate` starts a new cache; None if it never does.

    Phi-3 does this when its frequencies change, because the cached keys were rotated by the old ones. The sign of it is
    a `prepare_inputs_for_generation` in its own class; the length is in its config.
    """
    is_long = any(_rope_types(module) == ["longrope"] for module in model.modules())
    if is_long and "prepare_inputs_for_generation" in vars(type(model)):
        return getattr(model.config, "original_max_position_embeddings", None)
    return None


def _has_state(module: nn.Module) -> bool:
    return any(_depends_on_length(each) for each in _rope_types(module))


def _rope_types(module: nn.Module) -> list:
    types = getattr(module, "rope_type", None)
    return list(types.values()) if isinstance(types, dict) else [types]


def _depends_on_length(rope_type: Any) -> bool:
    return isinstance(rope_type, str) and (rope_type == "longrope" or "dynamic" in rope_type)


def _forward(module: Any, x, position_ids, layer_type=None):
    """The module's own forward, on frequencies for these positions, without the part that keeps them."""
    options = {} if layer_type is None else {"layer_type": layer_type}
    own = inspect.unwrap(type(module).forward)
    if not _depends_on_length(module.rope_type if layer_type is None else module.rope_type[layer_type]):
        return own(module, x, position_ids, **options)
    name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
    stored = module._buffers.pop(name)
    vars(module)[name] = _frequencies(module, position_ids, layer_type)
    try:
        return own(module, x, position_ids, **options)
    finally:
        del vars(module)[name]
        module._buffers[name] = stored


def _frequencies(module: Any, position_ids: torch.Tensor, layer_type: str | None) -> torch.Tensor:
    """Frequencies for the largest position, `(rotary_size / 2,)`."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    length = position_ids.max() + 1
    rope_type = module.rope_type if layer_type is None else module.rope_type[layer_type]
    compute = partial(ROPE_INIT_FUNCTIONS[rope_type], module.config, position_ids.device, layer_type=layer_type)
    if rope_type != "longrope":
        return compute(seq_len=length)[0]
    parameters = module.config.rope_parameters
    parameters = parameters if layer_type is None else parameters[layer_type]
    trained = parameters["original_max_position_embeddings"]
    return torch.where(length > trained, compute(seq_len=trained + 1)[0], compute(seq_len=trained)[0])
