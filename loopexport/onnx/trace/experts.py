"""Sparse experts as one node of a trace, which `quantise/experts` turns into `QMoE`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.integrations import moe

DOMAIN, EXPERTS = (
    "loopexport.experts",
    "Experts",
)  # inputs: tokens, chosen experts, their weights, both matrices; attribute `k`
IMPLEMENTATION = {"single": "batched_mm", "whole": "loopexport_onnx"}


def register_experts() -> None:
    """Register the implementation "whole" with transformers."""
    moe.ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION["whole"], _run)


def are_whole(config: Any, block_size: int) -> bool:
    """Whether all experts of a native model are ones that `QMoE` computes.

    Args:
        config: its config object of transformers.
        block_size: of the quantised experts.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not model_class._can_set_experts_implementation():
        return False
    with torch.device("meta"):
        model = model_class._from_config(config)
    experts = [module for module in model.modules() if hasattr(module, "gate_up_proj") and hasattr(module, "has_gate")]
    return bool(experts) and all(_is_plain(module, block_size) for module in experts)


def _is_plain(module: Any, block_size: int) -> bool:
    """Whether experts are `down(silu(gate(x)) * up(x))`, in whole blocks."""
    is_gated = module.has_gate and module.is_concatenated and type(module)._apply_gate is moe._default_apply_gate
    has_more = module.has_bias or module.is_transposed or getattr(module, "has_post_expert_norm", False)
    activation = getattr(module, "act_fn", None)
    is_silu = isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"
    if not is_gated or has_more or not is_silu:
        return False
    return all(each.shape[-1] % block_size == 0 for each in (module.gate_up_proj, module.down_proj))


def _run(module: Any, hidden_states, top_k_index, top_k_weights) -> torch.Tensor:
    inputs = (hidden_states, top_k_index, top_k_weights, module.gate_up_proj, module.down_proj)
    attributes: dict[str, Any] = {"k": top_k_index.shape[-1]}
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{EXPERTS}", inputs, attributes, dtype=hidden_states.dtype, shape=hidden_states.shape, version=1
    )
