"""Which loops vLLM serves exactly, decided from the spec and the config alone.

Every export has a copy of this file. It needs only the standard library, so that LoopExport can write a model card
without importing torch.
"""

from __future__ import annotations

from .looped_spec import LoopSpec

# The next four are what the walk over families found, `tests/records/vllm`; a test compares them with its record.

# Families for which vLLM gives the greedy tokens of transformers; the documentation has the settings.
VLLM_FAMILIES = (
    "afmoe", "apertus", "arcee", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5",
    "ernie4_5_moe", "exaone4", "exaone_moe", "flex_olmo", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "glm4_moe",
    "glm4_moe_lite", "gpt_neox", "gpt_oss", "granite", "granitemoe", "granitemoeshared", "helium", "hunyuan_v1_dense",
    "hunyuan_v1_moe", "llama", "ministral", "ministral3", "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmo3",
    "olmoe", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "solar_open",
    "stablelm", "starcoder2",
)  # fmt: skip

# Families that vLLM cannot serve even without a loop, and why.
VLLM_REFUSED = {
    "gpt2": "has weights that vLLM does not load",
    "minimax_m2": "has routers without softmax, and vLLM stops at them on a CPU",
    "phimoe": "has routers whose answer vLLM cannot read",
}

# Those of the first whose experts vLLM computes itself, always with silu.
VLLM_EXPERTS = (
    "afmoe", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe",
    "glm4_moe_lite", "granitemoe", "granitemoeshared", "hunyuan_v1_moe", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe",
    "solar_open",
)  # fmt: skip

# Those of the first whose routers torch.compile computes wrongly on a CPU in iterations. They add a bias to the output
# of a linear layer; torch 2.13 fuses this sum with the one in the natural pass, and so reads the output too early.
VLLM_CPU_EAGER = ("afmoe",)

# Ways to quantise, by `quant_method`, with which loops on vLLM were compared.
VLLM_QUANTISED = ("awq", "compressed-tensors", "gptq")

# What kv reference and decode bypass need: each prompt in one chunk.
WHOLE_PROMPTS = "--no-enable-chunked-prefill --no-enable-prefix-caching"


def vllm_refusal(family: str, spec: LoopSpec, config: dict) -> str | None:
    """Why vLLM cannot serve a loop on a model, and what to do; None if it gives the greedy tokens of transformers.

    Args:
        family: the base's `model_type`.
        spec: the loop.
        config: the content of the base's `config.json`.
    """
    refusal = None if spec.is_identity else _vllm_loop_refusal(family, spec)
    return refusal or _vllm_model_refusal(family, config)


def vllm_flags(spec: LoopSpec) -> tuple[str, ...]:
    """The flags of vLLM's server without which a loop is refused."""
    needs_whole = spec.kv == "reference" or spec.decode == "bypass"
    flags = ((needs_whole, WHOLE_PROMPTS), (spec.decode == "bypass", "--enforce-eager"))
    return tuple(flag for is_needed, flag in flags if is_needed and not spec.is_identity)


def _vllm_loop_refusal(family: str, spec: LoopSpec) -> str | None:
    if family not in VLLM_FAMILIES:
        return f"family {family} {VLLM_REFUSED.get(family, 'was not tried there')}; use transformers"
    if spec.decode == "first_n":
        return "decode first_n depends on how many tokens are generated, and vLLM does not say; set loop_decode to full"
    if spec.decode == "bypass" and spec.kv == "per_step":
        return "decode bypass needs kv shared or reference there; set loop_kv to shared, or loop_decode to full"
    return None


def _vllm_model_refusal(family: str, config: dict) -> str | None:
    """Reasons in the config: where vLLM computes something else than the family's code."""
    activation = config.get("hidden_act", "silu")
    if family in VLLM_EXPERTS and activation not in ("silu", "swish"):
        return f"vLLM computes experts with silu and ignores hidden_act ({activation}); use transformers"
    if family == "mixtral" and config.get("num_experts_per_tok") == 1:
        return "vLLM weights a single expert (num_experts_per_tok 1), mixtral's code does not; use transformers"
    return None


def vllm_context(config: dict) -> int | None:
    """The longest context, in tokens, for which vLLM equals transformers; None if there is no limit.

    Rotary embeddings of types longrope and dynamic depend on the largest position in a forward, and a forward of vLLM
    has the tokens of many requests.
    """
    parameters = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(parameters, dict):
        return None
    by_layer_type = [each for each in parameters.values() if isinstance(each, dict)]
    limits = [_rope_limit(each, config) for each in by_layer_type or [parameters]]
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


def _rope_limit(parameters: dict, config: dict) -> int | None:
    """The number of positions up to which rotary frequencies are constant; None if they always are."""
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    trained = config.get("max_position_embeddings")
    if rope_type in ("longrope", "su"):
        name = "original_max_position_embeddings"
        return parameters.get(name) or config.get(name) or trained
    return trained if "dynamic" in str(rope_type) else None
