"""Sparse experts as one node of a trace, which `quantise/experts` turns into `QMoE`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.integrations import moe

DOMAIN, EXPERTS = "loopexport.experts", "Experts"  # inputs: tokens, the chosen experts and their weights, then `gate_up_proj` and `down_proj`
IMPLEMENTATION = {"single": "batched_mm", "whole": "loopexport_onnx"}


def register(block_size: int) -> None:
    """Register the implementation "whole" with transformers.

    Args:
        block_size: of the quantised experts; those whose matrices are no whole blocks are traced in single operations.
    """

    def run(module: Any, hidden_states, top_k_index, top_k_weights):
        inputs = (hidden_states, top_k_index, top_k_weights)
        if not _is_plain(module, block_size):
            return moe.batched_mm_experts_forward(module, *inputs)
        weights = (module.gate_up_proj, module.down_proj)
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{EXPERTS}", (*inputs, *weights), dtype=hidden_states.dtype, shape=hidden_states.shape, version=1
        )

    moe.ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION["whole"], run)


def _is_plain(module: Any, block_size: int) -> bool:
    """Whether experts are `down(silu(gate(x)) * up(x))`, in whole blocks, which `QMoE` computes."""
    is_gated = module.has_gate and module.is_concatenated and type(module)._apply_gate is moe._default_apply_gate
    has_more = module.has_bias or module.is_transposed or getattr(module, "has_post_expert_norm", False)
    is_silu = isinstance(module.act_fn, nn.SiLU) or type(module.act_fn).__name__ == "SiLUActivation"
    if not is_gated or has_more or not is_silu:
        return False
    return all(each.shape[-1] % block_size == 0 for each in (module.gate_up_proj, module.down_proj))
