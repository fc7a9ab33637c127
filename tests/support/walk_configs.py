"""Tiny configs and bases of every text family: the class's defaults, with every size made small.

`support.tiny` has richer ones of a few families, `support.multimodal_configs` has those of multimodal families.
"""

from __future__ import annotations

import inspect
import re
import warnings
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

GATE = re.compile(r"attn_(mlp_)?gate$|alpha_(cross_attn|dense)$")
MAX_PARAMETERS = 50_000_000

# Values for the fields of these names, in every config that has them.
TINY = {
    "vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "is_decoder": True,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
    "n_embd": 64, "n_layer": 6, "n_layers": 6, "num_layers": 6, "n_head": 4, "n_heads": 4, "n_inner": 96,
    "n_positions": 64, "ffn_hidden_size": 96, "d_model": 64, "rotary_dim": 8,
    "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_expand": 2,
    "linear_head_dim": 16, "linear_num_heads": 4, "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
MLA = {
    "q_lora_rank": 32, "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12,
    "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip
# Further values that a family needs to exist at this size.
SPECIAL: dict[str, dict] = {
    "apertus": {"hidden_act": "silu"},
    "bamba": {"attn_layer_indices": [1, 4]},
    "blenderbot": {"decoder_layers": 6, "decoder_ffn_dim": 96, "decoder_attention_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]], "window_size": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 3},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1},
    "zaya": {"num_experts_per_tok": 1},
    "jamba": {"use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba": {"use_mamba_kernels": False},
    "doge": {"keep_window_size": 64},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "laurel_rank": 8,
        "vocab_size_per_layer_input": 131,
        "hidden_size_per_layer_input": 16,
        "activation_sparsity_pattern": [0.0] * 6,
    },
    "gemma4_text": {
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "vocab_size_per_layer_input": 131,
        "hidden_size_per_layer_input": 16,
    },
    "inkling2_text": {"unpadded_vocab_size": 131},
    "inkling2_loop_text": {"unpadded_vocab_size": 131},
    "git": {"vision_config": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "image_size": 32}},
    "xmod": {"default_language": "en_XX"},
    "cpmant": {"prompt_length": 4, "prompt_types": 1, "segment_types": 1, "dim_head": 16},
}


def tiny_family_config(family: str, **overrides):
    """A tiny config of any family; `support.tiny` has richer ones of a few families."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        default = CONFIG_MAPPING[family]()
    fields = {
        *vars(default),
        *inspect.signature(type(default).__init__).parameters,
        *getattr(default, "attribute_map", {}),
    }
    values = {**TINY, **(MLA if "kv_lora_rank" in fields else {})}
    values = {name: value for name, value in values.items() if name in fields}
    return AutoConfig.for_model(family, **{**values, **SPECIAL.get(family, {}), **overrides})


def save_tiny_family(family: str, directory: Path, **overrides) -> Path:
    """Save a tiny random base of any family."""
    return save_base(tiny_family_config(family, **overrides), directory)


def save_base(config, directory: Path, auto=AutoModelForCausalLM) -> Path:
    """Save a random base with this config. ValueError if it is not tiny."""
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"its tiny model has {size:,} parameters")
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    for name, parameter in model.named_parameters():  # large enough for a loop to show, whatever the family starts with
        if parameter.dim() in (2, 4) and "embed" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif parameter.dim() == 1 and GATE.search(name):  # gates of cross-attention start closed
            torch.nn.init.constant_(parameter, 0.5)
    model.save_pretrained(directory)
    return directory
