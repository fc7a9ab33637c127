"""Tiny bases that vLLM can run: its attention on a CPU needs heads of 32 or more, and its MLA kernel real widths."""

from __future__ import annotations

from pathlib import Path

from support.tiny import FAMILIES, save_tiny
from support.walk_configs import save_tiny_family, tiny_family_config

# Values for the fields of these names, where a family has them.
WIDE = {
    "hidden_size": 128, "n_embd": 128, "d_model": 128, "head_dim": 32, "rotary_dim": 16, "sliding_window": 8,
    "attention_chunk_size": 16, "max_position_embeddings": 256, "n_positions": 256, "n_ctx": 256, "max_seq_len": 256,
    "initializer_range": 0.15,  # or else experts are so small that it does not matter which ones are chosen
}  # fmt: skip
MLA = {
    "q_lora_rank": 32, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "head_dim": 64, "num_key_value_heads": 4, "max_position_embeddings": 256,
}  # fmt: skip
# For the families of `support.tiny`, of which many read a `head_dim` that is not a field.
HEADS = {"head_dim": 32, "max_position_embeddings": 256}
# These have no such field: their heads are as wide as the hidden state allows.
WITHOUT_HEAD_DIM = {"hidden_size": 128, "max_position_embeddings": 256}
# Gemma scales its embeddings, beside which layers would not show.
OTHERS = {"gemma": {"initializer_range": 0.02}}


def save_servable(family: str, directory: Path, **overrides) -> Path:
    """Save a tiny random base of a family that vLLM can run."""
    if family in FAMILIES:
        return save_tiny(family, directory, **{**_rich_widths(family), **overrides})
    config = tiny_family_config(family)
    known = {*config.to_dict(), *config.attribute_map}
    widths = {**WIDE, **(MLA if "kv_lora_rank" in known else {}), **OTHERS.get(family, {})}
    return save_tiny_family(family, directory, **{name: widths[name] for name in widths.keys() & known}, **overrides)


def _rich_widths(family: str) -> dict:
    """Widths for a family of `support.tiny`."""
    if "kv_lora_rank" in FAMILIES[family]:
        return MLA
    return WITHOUT_HEAD_DIM if family in ("gpt2", "gpt_neox") else HEADS
