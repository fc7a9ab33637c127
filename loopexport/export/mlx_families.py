"""Which families were compared in MLX, and which cannot be looped there."""

from __future__ import annotations

from loopexport.loop.spec import LoopSpec
from loopexport.templates.looped_mlx_limits import mlx_loop_refusal

# The next two are what the walk over families found, `tests/records/mlx.json`; a test compares them with it.

# Families for which MLX gives the logits of transformers; the documentation has the table.
MLX_FAMILIES = (
    "afmoe", "cohere", "cohere2", "deepseek_v3", "dots1", "ernie4_5", "gemma2", "gemma3_text", "glm4", "glm4_moe",
    "granite", "granitemoe", "helium", "hunyuan_v1_dense", "internlm3", "iquestcoder", "llama", "ministral3",
    "mistral", "mixtral", "nemotron", "olmo2", "olmo3", "olmoe", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_moe", "seed_oss", "smollm3", "stablelm",
)  # fmt: skip

# Families that both libraries have, but that cannot be looped in MLX, and why.
MLX_REFUSED = {
    "mamba": "remembers more than keys and values",
}


def mlx_refusal(family: str, spec: LoopSpec) -> str | None:
    """Why MLX does not run a loop on a family, and what to do; None if it gives the logits of transformers.

    Args:
        family: the base's `model_type`.
        spec: the loop.
    """
    if family not in MLX_FAMILIES:
        return f"family {family} {MLX_REFUSED.get(family, 'was not tried there')}; use transformers"
    return None if spec.is_identity else mlx_loop_refusal(spec)
