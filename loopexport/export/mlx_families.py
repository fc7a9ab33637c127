"""Which families were compared in MLX, and which cannot be looped there: what the walk over both libraries found."""

from __future__ import annotations

import math

from loopexport.loop.spec import LoopSpec
from loopexport.templates.looped_mlx_limits import (
    SLIDING,
    WITHOUT_KINDS,
    mlx_config_fields,
    mlx_loop_refusal,
    scaling_type,
)

# Families for which a loop in MLX gives the logits of transformers, or comes as near to them as mlx-lm's base does.
MLX_FAMILIES = (
    "afmoe", "apertus", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5", "exaone4",
    "exaone_moe", "gemma", "gemma2", "gemma3_text", "glm4", "glm4_moe", "glm4_moe_lite", "gpt2", "gpt_bigcode",
    "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe", "helium", "hunyuan_v1_dense", "internlm3",
    "iquestcoder", "laguna", "llama", "mellum", "ministral3", "mistral", "mixtral", "nemotron", "olmo2", "olmo3",
    "olmoe", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3",
    "solar_open", "stablelm", "starcoder2",
)  # fmt: skip

# Families with layers that remember more than keys and values: so under kv per_step alone.
MLX_PER_STEP = ("deepseek_v32", "falcon_mamba", "lfm2_moe", "mamba", "qwen3_next")

# The other families of both libraries, and why they are refused.
_REFUSED = {
    "was not compared in MLX, since mlx-lm does not load a tiny model of it": (
        "bailing_hybrid", "bitnet", "exaone", "falcon_h1", "glm_moe_dsa", "granitemoehybrid", "kimi_linear", "lfm2",
        "llama4_text", "mamba2", "mimo_v2_flash", "minicpm3", "minimax_m2", "nanochat", "olmo", "olmo_hybrid",
    ),
    "was not compared in MLX, since there is no tiny model of it with a loop": (
        "dbrx", "longcat_flash", "minimax", "recurrent_gemma",
    ),
    "gives other logits in mlx-lm than in transformers, without a loop too": ("ernie4_5_moe", "glm", "jamba"),
    "has layers without a cache of their own in mlx-lm": ("gemma4_text", "nemotron_h"),
}  # fmt: skip
MLX_REFUSED = {family: reason for reason, families in _REFUSED.items() for family in families}

# Families of which mlx-lm leaves out the sliding window; those among them that use it only if a field says so.
WITHOUT_WINDOW = (
    "dots1", "gemma2", "ministral3", "mistral", "mixtral", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_moe", "starcoder2",
)  # fmt: skip
WINDOW_IF_ASKED = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe")

# Those of which the window starts at a layer, unless `layer_types` says otherwise.
WINDOW_FROM = ("dots1", "qwen2", "qwen3")


def mlx_refusal(config: dict, spec: LoopSpec, num_layers: int, prefix: str = "loop_") -> str | None:
    """Why MLX does not run a loop on a base, and what to do; None if it is as exact there as the base.

    Args:
        config: the base's.
        spec: the loop.
        num_layers: how many layers the base has.
        prefix: what makes a setting out of the name of a field.
    """
    family = config["model_type"]
    if family not in (*MLX_FAMILIES, *MLX_PER_STEP):
        return f"family {family} {MLX_REFUSED.get(family, 'was not compared in MLX')}; use transformers"
    try:
        mlx_config_fields(family, config)
    except ValueError as error:
        return f"{error}; use transformers"
    if spec.is_identity:
        return None
    if family in MLX_PER_STEP and spec.kv == "shared":
        return (
            f"family {family} remembers more than keys and values, which kv shared cannot hand on; set {prefix}kv to "
            "per_step"
        )
    return mlx_loop_refusal(spec, num_layers, prefix)


def mlx_warnings(config: dict) -> list[str]:
    """In what mlx-lm's model of a base differs from that of transformers, with or without a loop, one line each."""
    window, rope = _ignored_window(config), config.get("rope_scaling") or config.get("rope_parameters") or {}
    found = {
        f"leaves out the sliding window of {window} tokens, so on longer texts": window is not None,
        "takes the long factors of longrope for all texts, so on short ones": scaling_type(rope) in ("longrope", "su"),
        "rounds the bounds of YaRN in spite of truncate false, so": rope.get("truncate") is False,
    }
    return [
        f"mlx-lm's {config['model_type']} {what} its logits differ from those of transformers, with or without a loop"
        for what, is_so in found.items()
        if is_so
    ]


def _ignored_window(config: dict) -> int | None:
    """The sliding window that transformers uses in a model and mlx-lm does not; None if there is none."""
    family, window = config["model_type"], config.get("sliding_window")
    if family not in WITHOUT_WINDOW or not window or window >= config.get("max_position_embeddings", math.inf):
        return None
    is_asked = family not in WINDOW_IF_ASKED or config.get("use_sliding_window", False)
    kinds = () if family in WITHOUT_KINDS else config.get("layer_types")
    has_late = family in WINDOW_FROM and config.get("max_window_layers", 0) >= config.get("num_hidden_layers", 1)
    is_used = SLIDING in kinds if kinds else not has_late
    return window if is_asked and is_used else None
