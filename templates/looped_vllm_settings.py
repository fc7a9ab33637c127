"""Which settings of vLLM's engine serve a loop exactly, checked while vLLM builds the model; used nowhere else.

Every export has a copy of this file. It needs only torch and transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from .configuration_looped import base_model_type
from .looped_spec import LoopSpec
from .looped_vllm_limits import VLLM_CPU_EAGER, WHOLE_PROMPTS, vllm_context, vllm_refusal

DRAFTS = ("ngram",)  # methods of speculative decoding for which it was found exact


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
    refusals = [vllm_refusal(family, spec, values), _refused_length(engine, values), _refused_scale(engine, values)]
    if not spec.is_identity:
        refusals += _refused_settings(engine, config, spec)
    for refusal in refusals:
        if refusal is not None:
            raise ValueError(not_on_vllm(refusal))


def layers_with_own_routers(engine, spec: LoopSpec, num_layers: int) -> Sequence[int]:
    """The layers whose routers must stay modules of their own, which vLLM does not fuse with the experts.

    A fused router cannot be frozen. And with torch.compile, vLLM was found to compute fused blocks that have shared
    experts wrongly, also without a loop; then a base (one step) that is wrong would make any loop look better.
    """
    if not engine.model_config.enforce_eager:
        return range(num_layers)
    return spec.layers if spec.frozen_routing and not spec.is_identity else ()


def _refused_length(engine, config: dict) -> str | None:
    context = vllm_context(config)
    if context is None or engine.model_config.max_model_len <= context:
        return None
    return (
        f"beyond {context} positions, the longest request changes the rotary embeddings of all requests; add "
        f"--max-model-len {context}"
    )


def _refused_scale(engine, config: dict) -> str | None:
    scale = config.get("embedding_multiplier", 1)
    if engine.parallel_config.pipeline_parallel_size == 1 or scale == 1:
        return None
    return (
        f"each pipeline stage multiplies its input by embedding_multiplier ({scale}), not just the first one; use "
        "--tensor-parallel-size instead"
    )


def _refused_settings(engine, config, spec: LoopSpec):
    """The reason for each setting of the engine with which it cannot serve a loop."""
    drafts, family = engine.speculative_config, base_model_type(config.model_type)
    refusals = (
        (
            drafts is not None and drafts.method not in DRAFTS,
            f"with speculative decoding by {drafts and drafts.method}, answers were not compared; use "
            f"{' or '.join(DRAFTS)}, or leave --speculative-config out",
        ),
        (
            drafts is not None and (spec.kv == "reference" or spec.decode == "bypass"),
            "kv reference and decode bypass need generated tokens one by one, and speculative decoding checks several "
            "at once; leave --speculative-config out",
        ),
        (
            spec.kv == "reference" and not _keeps_prompts_whole(engine),
            f"kv reference depends on where chunks start; add {WHOLE_PROMPTS}, or set loop_kv to shared or per_step",
        ),
        (
            spec.decode == "bypass" and not (_keeps_prompts_whole(engine) and engine.model_config.enforce_eager),
            f"decode bypass depends on where a prompt ends; add {WHOLE_PROMPTS} --enforce-eager, or set loop_decode to "
            "full",
        ),
        (
            spec.decode == "bypass" and engine.parallel_config.data_parallel_size > 1,
            "with decode bypass, one replica loops while another does not, and their experts wait for each other; "
            "leave --data-parallel-size out, or set loop_decode to full",
        ),
        (
            engine.parallel_config.enable_expert_parallel,
            "expert parallelism could not be compared, since vLLM's kernels for CPUs ignore which experts a process "
            "has; leave --enable-expert-parallel out",
        ),
        (
            _is_compiled_on_cpu(engine) and not spec.frozen_routing and family in VLLM_CPU_EAGER,
            f"on a CPU, torch.compile computes the routers of {family} wrongly in iterations; add --enforce-eager, or "
            "set loop_frozen_routing to true",
        ),
    )
    return [*(reason for holds, reason in refusals if holds), _refused_stages(engine, config, spec)]


def _is_compiled_on_cpu(engine) -> bool:
    return engine.device_config.device_type == "cpu" and not engine.model_config.enforce_eager


def _refused_stages(engine, config, spec: LoopSpec) -> str | None:
    """The reason if a stage of a pipeline holds a part of what loops as one function: it would loop that part alone."""
    first_layers = _first_layers(engine, config.get_text_config(decoder=True).num_hidden_layers)
    for body in spec.bodies:
        cuts = [layer for layer in first_layers if body.crosses(layer)]
        if cuts:
            return (
                f"a pipeline stage starts at layer {cuts[0]}, inside span {body.hull.start}:{body.hull.stop}; choose "
                "stages with VLLM_PP_LAYER_PARTITION, or use --tensor-parallel-size instead"
            )
    return None


def _first_layers(engine, num_layers: int) -> list[int]:
    """The numbers of the layers with which the stages of a pipeline start."""
    stages = engine.parallel_config.pipeline_parallel_size
    indices = import_module("vllm.distributed.utils").get_pp_indices if stages > 1 else None
    return [indices(num_layers, stage, stages)[0] for stage in range(1, stages)]


def _keeps_prompts_whole(engine) -> bool:
    """Whether each prompt is one chunk."""
    return not (engine.scheduler_config.enable_chunked_prefill or engine.cache_config.enable_prefix_caching)


def not_on_vllm(reason: str) -> str:
    """The error for a reason why vLLM cannot serve a model."""
    return f"cannot serve this looped model on vLLM: {reason}"
