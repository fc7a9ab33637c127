"""Which loops vLLM serves exactly, told from the spec and the config alone.

Copied byte for byte into every exported directory; it needs the standard library alone, so that a model card can be
written where torch is not installed.
"""

from __future__ import annotations

from .looped_spec import LoopSpec

# Families whose greedy tokens vLLM was found to give as transformers does; the README has under which settings.
VLLM_FAMILIES = (
    "gemma2", "gemma3_text", "glm4_moe", "gpt_neox", "gpt_oss", "granite", "llama", "mistral", "mixtral", "olmo2",
    "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
)  # fmt: skip


# Those of them whose experts vLLM computes itself, whatever activation the config names.
VLLM_EXPERTS = ("glm4_moe", "mixtral", "qwen2_moe", "qwen3_moe")

# Those of which torch.compile was found to compute loops wrongly there, where --enforce-eager gives the right tokens.
VLLM_EAGER = ("glm4_moe",)


def vllm_refusal(family: str, spec: LoopSpec, config: dict) -> str | None:
    """Why vLLM is not to serve a loop on a model, and what to do; None where it gives the tokens of transformers.

    Args:
        family: the base's model type.
        spec: the loop.
        config: the base's config, as config.json has it.
    """
    refusal = None if spec.is_identity else _vllm_loop_refusal(family, spec)
    return refusal or _vllm_model_refusal(family, config)


def _vllm_loop_refusal(family: str, spec: LoopSpec) -> str | None:
    if family not in VLLM_FAMILIES:
        return f"family {family} is none of those found exact there, {', '.join(VLLM_FAMILIES)}; use transformers"
    if spec.kv == "reference":
        return "kv reference depends on where chunks start, which vLLM chooses; set loop_kv to shared or per_step"
    if spec.kv == "per_step" and family == "gpt_oss":
        return "kv per_step was not made to work with attention sinks; set loop_kv to shared"
    if spec.decode != "full":
        return f"decode {spec.decode} depends on where a prompt ends, which vLLM does not tell; set loop_decode to full"
    if spec.frozen_routing:
        return (
            "vLLM chooses experts inside of its fused layer, where nothing can be frozen; set loop_frozen_routing to "
            "false"
        )
    return None


def _vllm_model_refusal(family: str, config: dict) -> str | None:
    """What vLLM computes by fields of the config, not by the family's code, where the two differ."""
    activation = config.get("hidden_act", "silu")
    if family in VLLM_EXPERTS and activation not in ("silu", "swish"):
        return f"vLLM computes experts with silu, whatever hidden_act says ({activation}); use transformers"
    if family == "mixtral" and config.get("num_experts_per_tok") == 1:
        return "vLLM weighs a single expert (num_experts_per_tok 1) where mixtral does not; use transformers"
    return None


def vllm_context(config: dict) -> int | None:
    """The longest context, in tokens, that vLLM serves as transformers does; None where there is no limit.

    Rotary embeddings of types longrope and dynamic follow the largest position of a forward, which at vLLM holds the
    tokens of many requests.
    """
    parameters = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(parameters, dict):
        return None
    by_layer_type = [each for each in parameters.values() if isinstance(each, dict)]
    limits = [_rope_limit(each, config) for each in by_layer_type or [parameters]]
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


def _rope_limit(parameters: dict, config: dict) -> int | None:
    """The number of positions up to which rotary frequencies stay as they are; None where they do at any."""
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    trained = config.get("max_position_embeddings")
    if rope_type in ("longrope", "su"):
        name = "original_max_position_embeddings"
        return parameters.get(name) or config.get(name) or trained
    return trained if "dynamic" in str(rope_type) else None
