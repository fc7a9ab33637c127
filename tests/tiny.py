"""Tiny random base checkpoints, one per family, with every structural feature of the family on."""

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
    # Wide enough that one pass through the span moves the hidden states, so that a wrong loop cannot go unseen.
    "initializer_range": 0.15,
}
# The span 1:4 then holds layers of both kinds.
MIXED_LAYERS = ["sliding_attention", "full_attention"] * (NUM_LAYERS // 2)
SLIDING = {"sliding_window": SLIDING_WINDOW}

FAMILIES: dict[str, dict] = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {**SLIDING, "use_sliding_window": True, "layer_types": MIXED_LAYERS, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 24, "tie_word_embeddings": True},
    "mistral": {**SLIDING, "head_dim": 16},
    "gemma2": {**SLIDING, "head_dim": 16, "layer_types": MIXED_LAYERS, "query_pre_attn_scalar": 16},
    "gemma3_text": {**SLIDING, "head_dim": 16, "layer_types": MIXED_LAYERS, "query_pre_attn_scalar": 16},
    "phi3": {**SLIDING, "resid_pdrop": 0.0},
    "olmo2": {},
}


def tiny_config(family: str, **overrides):
    """The tiny config of a family."""
    return AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **overrides})


def tiny_model(family: str, seed: int = 0, **overrides):
    """A tiny random model of a family, in fp32 and eval mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides))
    for name, parameter in model.named_parameters():  # norms start at a constant, which would hide mistakes
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
    return model.eval()


def save_tiny(family: str, directory: Path, **overrides) -> Path:
    """Save a tiny base of a family."""
    tiny_model(family, **overrides).save_pretrained(directory)
    return directory


def tiny_tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    """Random token ids without the special ones, `(batch, length)`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)
