"""Tiny random base checkpoints, one per family, with all structural features of the family switched on."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

NUM_LAYERS = 6
SPAN = (1, 4)
SLIDING_WINDOW = 8
VOCAB = 131

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Large enough that one pass through the span changes the hidden states; else a wrong loop would go unnoticed.
    "initializer_range": 0.15,
}
# With these, the span 1:4 has layers of both kinds.
MIXED_LAYERS = ["sliding_attention", "full_attention"] * (NUM_LAYERS // 2)
SLIDING = {"sliding_window": SLIDING_WINDOW}

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
DEEP_MOE = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 2,
}
MLA = {
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "head_dim": 8,
    "num_key_value_heads": 4,
    # Latents and scaled experts amplify rounding: larger weights would hide everything else in fp32 comparisons.
    "initializer_range": 0.1,
}
ALL_HEADS = {"num_key_value_heads": 4}  # as many key and value heads as query heads
GPT2 = {**ALL_HEADS, "n_embd": 64, "n_inner": 96, "n_layer": NUM_LAYERS, "n_head": 4, "n_positions": 128}

FAMILIES: dict[str, dict] = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {**SLIDING, "use_sliding_window": True, "layer_types": MIXED_LAYERS, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 24, "tie_word_embeddings": True},
    "mistral": {**SLIDING, "head_dim": 16},
    "gemma2": {**SLIDING, "head_dim": 16, "layer_types": MIXED_LAYERS, "query_pre_attn_scalar": 16},
    "gemma3_text": {**SLIDING, "head_dim": 16, "layer_types": MIXED_LAYERS, "query_pre_attn_scalar": 16},
    "phi3": {**SLIDING, "resid_pdrop": 0.0},
    "olmo2": {},
    "granite": {
        "residual_multiplier": 0.8,
        "attention_multiplier": 0.25,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "tie_word_embeddings": True,
    },
    "gpt2": GPT2,
    "gpt_neox": {**ALL_HEADS, "rotary_pct": 0.5, "tie_word_embeddings": False},
    # Sparse experts; where the family has dense layers too, one is before the sparse layers and in the span.
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**MOE, **SLIDING, "shared_expert_intermediate_size": 40, "mlp_only_layers": [1]},
    "qwen3_moe": {**MOE, "head_dim": 24, "mlp_only_layers": [2], "norm_topk_prob": True},
    "gpt_oss": {
        **SLIDING,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "layer_types": MIXED_LAYERS,
    },
    "glm4_moe": {**DEEP_MOE, "head_dim": 16},
    "deepseek_v2": {**DEEP_MOE, **MLA},
    "deepseek_v3": {**DEEP_MOE, **MLA},
}
# Layers that attend to the positions that an indexer chooses: 4 of up to 20. The span 1:4 has a layer that runs its
# indexer and two that read the choice of the layer before, as does the layer after it, where a family has such layers.
INDEXER = {**DEEP_MOE, **MLA, "index_topk": 4, "index_head_dim": 16, "index_n_heads": 16, "initializer_range": 0.2}
BORROWED = {"indexer_types": ["full", "shared", "full", "shared", "shared", "full"]}
INDEXED: dict[str, dict] = {
    "deepseek_v32": INDEXER,
    "axk2": {**INDEXER, "gated_norm_rank": 8},
    "glm_moe_dsa": {**INDEXER, **BORROWED},
    "hy_v4": {**INDEXER, **BORROWED},
    "dots3_note_text": {
        **INDEXER,
        "layer_types": ["indexed_attention", "sliding_attention"] * (NUM_LAYERS // 2),
        "sliding_window": SLIDING_WINDOW,
        "shared_experts_intermediate_size": 48,
        **{f"swa_{name}": 4 for name in ("num_attention_heads", "num_key_value_heads")},
        **{f"swa_{name}": MLA[name] for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")},
        "swa_head_dim": MLA["qk_nope_head_dim"] + MLA["qk_rope_head_dim"],
        "swa_qk_rope_head_dim": MLA["qk_rope_head_dim"],
    },
    "qwen4_exp_text": {
        **MOE,
        "head_dim": 16,
        "shared_expert_intermediate_size": 40,
        "layer_types": ["linear_attention", *["indexed_attention"] * (NUM_LAYERS - 1)],
        "hc_count": 2,
        "hc_lowrank": 16,
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
}
# Layers that pool several tokens into one key; the pools close at different tokens, some inside of a chunk.
POOLED: dict[str, dict] = {
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "q_lora_rank": 32,
        "o_lora_rank": 16,
        "o_groups": 2,
        "partial_rotary_factor": 0.5,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "hc_mult": 2,
        "sliding_window": 5,
        "layer_types": [
            "sliding_attention",
            *["heavily_compressed_attention", "compressed_sparse_attention"] * 2,
            "sliding_attention",
        ],
        "compress_rates": {"heavily_compressed_attention": 4, "compressed_sparse_attention": 2},
        "index_topk": 3,
        "index_n_heads": 16,
        "index_head_dim": 16,
        "initializer_range": 0.2,
    }
}
# The families with sparse experts.
MOE_FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "glm4_moe", "deepseek_v2", "deepseek_v3")


# Families with recurrent layers: the delta rule, state spaces, a gated short convolution; alone or beside attention.
LINEAR_LAYERS = ["linear_attention", "linear_attention", "full_attention"] * (NUM_LAYERS // 3)
DELTA_RULE = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "layer_types": LINEAR_LAYERS,
}
STATE_SPACE = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 4,
}
RECURRENT: dict[str, dict] = {
    "qwen3_5_text": DELTA_RULE,
    "qwen3_next": {**DELTA_RULE, **MOE, "shared_expert_intermediate_size": 40},
    "granitemoehybrid": {
        **STATE_SPACE,
        "layer_types": LINEAR_LAYERS,
        "shared_intermediate_size": 96,
        "num_local_experts": 0,
    },
    "falcon_h1": {**STATE_SPACE, "mamba_d_ssm": 128, "head_dim": 16},  # both kinds of memory in each layer
    "lfm2": {"layer_types": ["conv", "conv", "full_attention"] * (NUM_LAYERS // 3)},
    "jamba": {  # Mamba-1
        "attn_layer_period": 3,
        "attn_layer_offset": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_dt_rank": 8,
    },
    "nemotron_h": {  # a mixer or a feed-forward network in a layer, not both
        "layer_types": ["linear_attention", "mlp", "linear_attention", "moe", "full_attention", "mlp"],
        "head_dim": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "ssm_state_size": 16,
        "conv_kernel": 4,
        "chunk_size": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "moe_shared_expert_intermediate_size": 48,
    },
    # A cache of its own.
    "minimax": {"layer_types": LINEAR_LAYERS, "num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 4},
}


def tiny_config(family: str, **overrides):
    """The tiny config of a family."""
    families = {**FAMILIES, **INDEXED, **POOLED, **RECURRENT}
    return AutoConfig.for_model(family, **{**COMMON, **families[family], **overrides})


def tiny_model(family: str, seed: int = 0, **overrides):
    """A tiny random model of a family, in fp32 and eval mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides))
    for name, parameter in model.named_parameters():  # norms start as constants, which would hide mistakes
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
    return model.eval()


def save_tiny(family: str, directory: Path, **overrides) -> Path:
    """Save a tiny base of a family."""
    tiny_model(family, **overrides).save_pretrained(directory)
    return directory


def tiny_tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    """Random token ids, `(batch, length)`, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)
