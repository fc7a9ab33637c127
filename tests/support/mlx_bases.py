"""Tiny bases whose `config.json` has the form of published checkpoints, which is the one that mlx-lm reads.

transformers 5 writes a config in another form: the rotary embedding in `rope_parameters`, and some fields under new
names. It reads both.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from support.tiny import FAMILIES, save_tiny
from support.walk_configs import save_tiny_family

# Features of the tiny models that mlx-lm leaves out of these families, with or without a loop, and sizes that it fixes.
WITHOUT_SLIDING = {"use_sliding_window": False, "sliding_window": None, "layer_types": None}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 64,
}
PLAIN: dict[str, dict] = {
    "apertus": {"hidden_act": "xielu"},
    "deepseek_v2": {"rope_parameters": {"rope_theta": 10000.0, **YARN}},
    "gemma2": {"sliding_window": 128, "layer_types": None},
    "gpt2": {"n_inner": 256},
    "gpt_neox": {"intermediate_size": 256},
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}},
    "gptj": {"n_inner": 256},
    "mistral": {"sliding_window": None},
    "phi3": {"sliding_window": None},
    "phimoe": {"attention_bias": True, "lm_head_bias": True},
    "qwen2": WITHOUT_SLIDING,
    "qwen2_moe": {**WITHOUT_SLIDING, "mlp_only_layers": []},
}
# How published configs say what the tiny ones say otherwise, or not at all.
PUBLISHED: dict[str, dict] = {
    "apertus": {"mlp_bias": False, "post_norm": False, "qk_norm": True},
    "deepseek_v2": {"rope_scaling": {**YARN, "type": "yarn"}},
    "exaone4": {"head_dim": 16, "sliding_window_pattern": "LLLG"},
    "exaone_moe": {"head_dim": 16, "is_moe_layer": [False, *[True] * 5]},
    "gemma3_text": {"sliding_window_pattern": 2},
    "gpt2": {"n_ctx": 128},
    "solar_open": {"intermediate_size": 96, "first_k_dense_replace": 0, "partial_rotary_factor": 1.0},
}
# Families whose published weights lack this prefix.
WITHOUT_PREFIX = {"gpt2": "transformer."}


def save_for_mlx(family: str, directory: Path, **overrides) -> Path:
    """Save a tiny random base of a family as the Hub would have it."""
    save = save_tiny if family in FAMILIES else save_tiny_family
    save(family, directory, **{**PLAIN.get(family, {}), **overrides})
    if family in WITHOUT_PREFIX:
        _rename(directory / "model.safetensors", WITHOUT_PREFIX[family])
    path = directory / "config.json"
    path.write_text(json.dumps(as_published(json.loads(path.read_text())), indent=2))
    return directory


def _rename(path: Path, prefix: str) -> None:
    """Take a prefix off the names of all tensors of a file."""
    save_file({name.removeprefix(prefix): each for name, each in load_file(path).items()}, path, {"format": "pt"})


def save_weights_for_mlx(directory: Path) -> Path:
    """Rewrite the experts of a tiny gpt_oss for mlx-lm, which reads the published form (MXFP4) or its own, as here."""
    path = directory / "model.safetensors"
    weights = {}
    for name, each in load_file(path).items():
        end = ".bias" if name.endswith("_bias") else ".weight"
        plain = name.removesuffix("_bias")
        if "experts." not in name:
            weights[name] = each
            continue
        each = each if end == ".bias" else each.transpose(1, 2)
        if "gate_up_proj" in plain:
            gate, up = (each[:, start::2].contiguous() for start in (0, 1))
            weights[plain.replace("gate_up_proj", "gate_proj") + end] = gate
            weights[plain.replace("gate_up_proj", "up_proj") + end] = up
        else:
            weights[plain + end] = each.contiguous()
    save_file(weights, path, {"format": "mlx"})
    return directory


def as_published(config: dict) -> dict:
    """A config as transformers 4 wrote it, for all that differs by name alone."""
    rope = config.get("rope_parameters") or {}
    is_by_type = "rope_theta" not in rope
    local, rope = rope.get("sliding_attention", {}), rope.get("full_attention", rope)
    named = {
        "rope_theta": rope.get("rope_theta"),
        "rotary_emb_base": rope.get("rope_theta"),
        "rope_local_base_freq": local.get("rope_theta"),
        "partial_rotary_factor": rope.get("partial_rotary_factor"),
        "rotary_pct": rope.get("partial_rotary_factor"),
        "num_experts": config.get("num_local_experts"),
    }
    added = {name: value for name, value in named.items() if value is not None and name not in config}
    scaling = {} if is_by_type else {"rope_scaling": None if rope.get("rope_type") == "default" else rope}
    return {**config, **added, **scaling, **PUBLISHED.get(config["model_type"], {})}
