"""Base models with random weights: tiny ones of three structures, and the shapes of real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

TINY_SPAN, TINY_STEPS = (1, 4), 4
_TINY = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    # Large enough that the loop changes the logits by more than any rounding.
    "initializer_range": 0.075,
}
_SPARSE = {"num_experts_per_tok": 2, "moe_intermediate_size": 128}
# A dense model, sparse experts, and latent attention (MLA) with sparse experts.
TINY: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 64},
    "qwen3_moe": {**_SPARSE, "head_dim": 64, "num_experts": 8, "norm_topk_prob": True},
    "deepseek_v3": {
        **_SPARSE,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 2,
        "num_key_value_heads": 4,
        "q_lora_rank": 96,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 32,
        "v_head_dim": 64,
        "head_dim": 32,
    },
}
SPARSE = ("qwen3_moe", "deepseek_v3")

# Shapes from the published configs.
_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}
REAL: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": {
        **_QWEN3,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "Qwen3-4B": {
        **_QWEN3,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
    "Moonlight-16B-A3B": {
        "model_type": "deepseek_v3",
        "vocab_size": 163840,
        "hidden_size": 2048,
        "intermediate_size": 11264,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "head_dim": 64,
        "routed_scaling_factor": 2.446,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
    },
}


def tiny_base(family: str, directory: Path) -> Path:
    """Save a tiny base of a family, in fp32."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**_TINY, **TINY[family]})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    return directory


def random_base(name: str, device: str, dtype: str, real: bool, layers: int | None = None) -> Any:
    """A native model with random weights, made on the device.

    Args:
        name: one of `REAL`.
        device: where to make it.
        dtype: one of `DTYPES`.
        real: whether to give it the real shapes; else tiny ones of the same family.
        layers: fewer layers of the same shapes; None for all.
    """
    fields = dict(REAL[name])
    family = fields.pop("model_type")
    if not real:
        fields = {**_TINY, **TINY[family]}
    if layers is not None:
        fields["num_hidden_layers"] = layers
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields), dtype=DTYPES[dtype]).eval()
