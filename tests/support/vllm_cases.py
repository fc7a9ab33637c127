"""Loops and settings that vLLM serves or refuses."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from loopexport.checks.vllm import ENGINE
from support.tiny import MOE_FAMILIES, SPAN, tiny_tokens

LENGTHS = (70, 41, 97, 5)
NEW_TOKENS = 32
BLOCK = ENGINE["block_size"]
ENGINES_PER_PROCESS = 10  # each engine keeps its K/V cache of 1 GiB until the process ends
# vLLM's attention on a CPU needs a head size of 32 or more.
LONG = {"max_position_embeddings": 256}
WIDE = {**LONG, "head_dim": 32}
SHAPES = {
    "gpt_neox": {**LONG, "hidden_size": 128},
    "gpt2": {**LONG, "n_positions": 256, "n_embd": 128, "hidden_size": 128},
    "deepseek_v3": {**LONG, "qk_rope_head_dim": 16, "v_head_dim": 32, "head_dim": 16},
}
EAGER, PARALLEL, COMPILED, STAGES = "eager", "tensor parallel 2", "torch.compile", "pipeline parallel 2"
ENGINES = {
    EAGER: {},
    PARALLEL: {"tensor_parallel_size": 2},
    COMPILED: {"enforce_eager": False},
    STAGES: {"pipeline_parallel_size": 2},
}
TWO_PROCESSES = (PARALLEL, STAGES)


@dataclass(frozen=True)
class Case:
    """A loop on a family, served in a setting.

    Attributes:
        family: of the tiny base.
        loop: fields of the spec.
        setting: one of `ENGINES`.
        engine: further arguments of the engine.
        refusal: a part of the error, if vLLM refuses the case.
    """

    family: str
    loop: dict = field(default_factory=dict)
    setting: str = EAGER
    engine: dict = field(default_factory=dict)
    refusal: str = ""

    @property
    def spec(self) -> dict:
        """All fields of the spec."""
        return {"span": SPAN, "steps": 3, **self.loop}

    @property
    def group(self) -> tuple[str, bool, str]:
        """Cases with the same group share a process; vLLM 0.28 cannot serve a sparse model after a dense one."""
        return self.setting, self.family in MOE_FAMILIES, ",".join(self.engine)

    def __str__(self):
        options = {**self.loop, **self.engine}
        return "-".join([self.family, *(f"{key}={value}" for key, value in options.items()), self.setting])


SHARED, PER_STEP = {}, {"kv": "per_step"}
POLICIES = (SHARED, PER_STEP)
LAYERS = {"mode": "layer", "anchor": 0.5, "norm_interpolation": True}
# `make test-vllm` serves FEW, `make record-vllm` MANY too. SLOW, half a minute to two each, only with
# SLOW=--with-slow.
FEW = [
    *(Case(family, kv) for family in ("llama", "gemma3_text", "qwen3_moe") for kv in POLICIES),
    Case("gpt_oss"),
    *(Case("llama", {**LAYERS, **kv}) for kv in POLICIES),
    Case("llama", {"span": ((1, 2), (3, 5)), "rule": "midpoint", **PER_STEP}),
    *(Case("llama", kv, setting) for setting in (PARALLEL, COMPILED) for kv in POLICIES),
]
RULES = {
    "residual_scaled": {},
    "ema": {},
    "ema_sched": {"schedule": (0.5, 0.3, 0.2)},
    "midpoint": {},
    "heun": {},
    "rk4": {"steps": 2},
    "heavy_ball": {},
    "norm_stab": {},
    "poly_blend": {"schedule": (0.1, 0.2, 0.3, 0.4)},
    "input_anchor": {},
    "uniform": {},
}
DENSE = ("qwen2", "qwen3", "mistral", "gemma2", "phi3", "olmo2", "granite", "gpt_neox")
SPARSE = ("mixtral", "qwen2_moe", "glm4_moe")
SETTINGS = (PARALLEL, COMPILED)
MANY = [
    *(Case(family, kv) for family in (*DENSE, *SPARSE) for kv in POLICIES),
    *(Case("qwen3", {"rule": rule, **options, **kv}) for rule, options in RULES.items() for kv in POLICIES),
    *(Case("qwen3_moe", {**LAYERS, **kv}) for kv in POLICIES),
]
SLOW = [
    *(Case(family, kv, setting) for setting in SETTINGS for family in ("gemma3_text", "qwen3_moe") for kv in POLICIES),
    *(
        Case(family, SHARED, setting)
        for setting in SETTINGS
        for family in (*DENSE, *SPARSE, "gpt_oss")
        if (family, setting) != ("glm4_moe", COMPILED)  # refused
    ),
]
# What a release of vLLM cannot do even for the base, by family and setting (None: all settings).
LACKING = {
    ("0.28", "gpt_oss", None): "ignores the attention sinks",
    ("0.28", "gpt_neox", None): "no module or parameter named",
    ("0.28", "gpt_neox", PARALLEL): "WorkerProc initialization failed",
    ("0.28", "mistral", PARALLEL): "Check failed: input.block_size",
    ("0.28", "phi3", PARALLEL): "view size is not compatible",
    ("0.32", "phi3", PARALLEL): "view size is not compatible",
}
REFUSED = [
    Case("llama", {"kv": "reference"}, refusal="kv reference depends on where chunks start"),
    Case("llama", {"decode": "bypass"}, refusal="decode bypass depends on where a prompt ends"),
    Case("llama", {"decode": "first_n", "first_n": 2}, refusal="decode first_n depends on where a prompt ends"),
    Case("qwen3_moe", {"frozen_routing": True}, refusal="set loop_frozen_routing to false"),
    Case("llama", {}, STAGES, refusal="each pipeline stage would loop only its own part"),
    Case("glm4_moe", {}, COMPILED, refusal="add --enforce-eager"),
    Case("llama", {}, EAGER, {"enable_lora": True}, refusal="adapters were not tested"),
    Case(
        "llama",
        {},
        EAGER,
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
        refusal="speculative decoding was not tested",
    ),
    Case("gpt2", refusal="family gpt2 was not found exact there"),
    Case("deepseek_v3", refusal="family deepseek_v3 was not found exact there"),
    Case("gpt_oss", PER_STEP, refusal="attention sinks"),
]


def draw_prompts(seed):
    """Four prompts of token ids."""
    return [tiny_tokens(1, length, seed=100 * (seed - 1) + length)[0].tolist() for length in LENGTHS]


PROMPTS = draw_prompts(1)


def as_parameters(few, many=(), slow=()):
    """Parameters for pytest; the cases of `many` run only with the matrix, those of `slow` only when asked for."""
    marked = [
        *((case, ()) for case in few),
        *((case, (pytest.mark.matrix,)) for case in many),
        *((case, (pytest.mark.matrix, pytest.mark.slow)) for case in slow),
    ]
    return [pytest.param(case, id=str(case), marks=marks) for case, marks in marked]
