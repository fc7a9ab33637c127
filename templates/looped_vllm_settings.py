"""Which settings of vLLM's engine serve a loop exactly, checked while vLLM builds the model; used nowhere else.

Every export has a copy of this file. It needs only torch and transformers.
"""

from __future__ import annotations

from .configuration_looped import base_model_type
from .looped_spec import LoopSpec
from .looped_vllm_limits import WHOLE_PROMPTS, vllm_context, vllm_refusal


def check_vllm(engine, config, spec: LoopSpec) -> None:
    """Check that vLLM serves a loop exactly with its current settings.

    Args:
        engine: the settings, a `VllmConfig`.
        config: the model's config.
        spec: the loop.

    Raises:
        ValueError: it does not, or this was not tested; the message says what to do.
    """
    family, values = base_model_type(config.model_type), config.to_dict()
    refusals = [vllm_refusal(family, spec, values), _refused_length(engine, values)]
    if not spec.is_identity:
        refusals += _refused_settings(engine, spec)
    for refusal in refusals:
        if refusal is not None:
            raise ValueError(not_on_vllm(refusal))


def keeps_routers_outside(engine, spec: LoopSpec) -> bool:
    """Whether routers of looped layers must stay modules of their own, which vLLM does not fuse with the experts.

    A fused router cannot be frozen. And with torch.compile, fused blocks that have shared experts, too, were found to
    compute loops wrongly.
    """
    return spec.frozen_routing or not engine.model_config.enforce_eager


def _refused_length(engine, config: dict) -> str | None:
    context = vllm_context(config)
    if context is None or engine.model_config.max_model_len <= context:
        return None
    return (
        f"beyond {context} positions, the longest request changes the rotary embeddings of all requests; add "
        f"--max-model-len {context}"
    )


def _refused_settings(engine, spec: LoopSpec):
    """The reason for each setting of the engine with which it cannot serve a loop."""
    parallel = engine.parallel_config
    refusals = (
        (
            parallel.pipeline_parallel_size > 1,
            "each pipeline stage would loop only its own part of a span; use --tensor-parallel-size instead",
        ),
        (engine.quant_config is not None, "quantised models were not tested; serve a model that is not quantised"),
        (engine.speculative_config is not None, "speculative decoding was not tested; leave --speculative-config out"),
        (engine.lora_config is not None, "adapters were not tested; leave --enable-lora out, or merge them first"),
        (parallel.enable_expert_parallel, "expert parallelism was not tested; leave --enable-expert-parallel out"),
        (
            spec.kv == "reference" and not _keeps_prompts_whole(engine),
            f"kv reference depends on where chunks start; add {WHOLE_PROMPTS}, or set loop_kv to shared or per_step",
        ),
        (
            spec.decode == "bypass" and not (_keeps_prompts_whole(engine) and engine.model_config.enforce_eager),
            f"decode bypass depends on where a prompt ends; add {WHOLE_PROMPTS} --enforce-eager, or set loop_decode to "
            "full",
        ),
    )
    return [reason for holds, reason in refusals if holds]


def _keeps_prompts_whole(engine) -> bool:
    """Whether each prompt is one chunk, and each generated token another one."""
    scheduler, cache = engine.scheduler_config, engine.cache_config
    return not (scheduler.enable_chunked_prefill or cache.enable_prefix_caching or engine.speculative_config)


def not_on_vllm(reason: str) -> str:
    """The error for a reason why vLLM cannot serve a model."""
    return f"cannot serve this looped model on vLLM: {reason}"
