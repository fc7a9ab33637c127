"""Tiny bases whose `config.json` has the form of published checkpoints, which is the one that mlx-lm reads.

transformers 5 writes a config in another form: the rotary embedding in `rope_parameters`, and some fields under new
names. It reads both.
"""

from __future__ import annotations

import json
from pathlib import Path

from support.tiny import FAMILIES, save_tiny
from support.walk_configs import save_tiny_family

# Features of the tiny models that mlx-lm leaves out of these families, with or without a loop.
WITHOUT_SLIDING = {"use_sliding_window": False, "sliding_window": None, "layer_types": None}
PLAIN: dict[str, dict] = {
    "mistral": {"sliding_window": None},
    "phi3": {"sliding_window": None},
    "qwen2": WITHOUT_SLIDING,
    "qwen2_moe": {**WITHOUT_SLIDING, "mlp_only_layers": []},
    "gemma2": {"sliding_window": 128, "layer_types": None},
}
# How published configs say what the tiny ones say otherwise.
PUBLISHED: dict[str, dict] = {
    "gemma3_text": {"sliding_window_pattern": 2},
    "gpt2": {"n_ctx": 128},
}


def save_for_mlx(family: str, directory: Path, **overrides) -> Path:
    """Save a tiny random base of a family as the Hub would have it."""
    save, values = (save_tiny, PLAIN.get(family, {})) if family in FAMILIES else (save_tiny_family, {})
    save(family, directory, **{**values, **overrides})
    path = directory / "config.json"
    path.write_text(json.dumps(as_published(json.loads(path.read_text())), indent=2))
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
