"""Which families were compared in MLX, and which cannot be looped there: what the walk over both libraries found."""

from __future__ import annotations

from loopexport.loop.spec import LoopSpec
from loopexport.templates.looped_mlx_limits import mlx_loop_refusal

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


def mlx_refusal(family: str, spec: LoopSpec, num_layers: int) -> str | None:
    """Why MLX does not run a loop on a family, and what to do; None if it is as exact there as the base.

    Args:
        family: the base's `model_type`.
        spec: the loop.
        num_layers: how many layers the base has.
    """
    if family not in (*MLX_FAMILIES, *MLX_PER_STEP):
        return f"family {family} {MLX_REFUSED.get(family, 'was not compared in MLX')}; use transformers"
    if spec.is_identity:
        return None
    if family in MLX_PER_STEP and spec.kv == "shared":
        return f"family {family} remembers more than keys and values, which kv shared cannot hand on; use kv per_step"
    return mlx_loop_refusal(spec, num_layers)
