"""Loops and settings that vLLM serves or refuses."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from loopexport.checks.vllm import ENGINE
from support.tiny import SPAN, tiny_tokens

LENGTHS = (70, 41, 97, 5)
NEW_TOKENS = 32
BLOCK = ENGINE["block_size"]
ENGINES_PER_PROCESS = 20
# Blocks of the K/V cache: enough for all prompts. vLLM would fill its 1 GiB, which each engine of a process keeps.
BLOCKS = {"num_gpu_blocks_override": 64}
WHOLE_PROMPTS = {"enable_chunked_prefill": False, "enable_prefix_caching": False, "max_num_batched_tokens": None}
EAGER, PARALLEL, COMPILED, STAGES = "eager", "tensor parallel 2", "torch.compile", "pipeline parallel 2"
PLAIN_HEADS = "VLLM_MLA_DISABLE=1"  # MLA computed as attention with plain heads
ENGINES = {
    EAGER: {},
    PARALLEL: {"tensor_parallel_size": 2},
    COMPILED: {"enforce_eager": False},
    STAGES: {"pipeline_parallel_size": 2},
    PLAIN_HEADS: {},
}
BIND_TWO = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
ENVIRONMENTS = {PARALLEL: BIND_TWO, STAGES: BIND_TWO, PLAIN_HEADS: {"VLLM_MLA_DISABLE": "1"}}

# Families by structure. The walk decides where a family belongs: these are served, `BASES` cannot be.
DENSE = (
    "qwen2", "qwen3", "mistral", "gemma2", "phi3", "olmo2", "granite", "gpt_neox", "smollm3", "seed_oss", "cohere2",
    "exaone4", "hunyuan_v1_dense", "olmo", "olmo3", "phi", "starcoder2", "glm", "glm4", "helium", "arcee", "stablelm",
    "nemotron", "apertus", "cohere", "gemma", "ministral", "ministral3", "ernie4_5",
)  # fmt: skip
SPARSE = (
    "mixtral", "qwen2_moe", "glm4_moe", "ernie4_5_moe", "granitemoe", "olmoe", "dots1", "granitemoeshared",
    "exaone_moe", "afmoe", "flex_olmo", "hunyuan_v1_moe", "solar_open",
)  # fmt: skip
MLA = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")


@dataclass(frozen=True)
class Case:
    """A loop on a family, served in a setting.

    Attributes:
        family: of the tiny base.
        loop: fields of the spec.
        setting: one of `ENGINES`.
        engine: further arguments of the engine.
        override: loop fields that the server changes at its start.
        refusal: a part of the error, if vLLM refuses the case.
    """

    family: str
    loop: dict = field(default_factory=dict)
    setting: str = EAGER
    engine: dict = field(default_factory=dict)
    override: dict = field(default_factory=dict)
    refusal: str = ""

    @property
    def spec(self) -> dict:
        """All fields of the spec."""
        return {"span": SPAN, "steps": 3, **self.loop}

    @property
    def group(self) -> tuple[str, bool]:
        """Cases with the same group share a process; vLLM cannot serve a sparse model after a dense one."""
        return self.setting, self.family in ALL_SPARSE

    @property
    def arguments(self) -> dict:
        """The arguments of the engine, but the model."""
        whole = WHOLE_PROMPTS if self.has_whole_prompts and not self.refusal else {}
        changed = {"hf_overrides": self.override} if self.override else {}
        settings = {**ENGINE, "max_model_len": 192, **BLOCKS, **whole, **changed}
        return {**settings, **ENGINES[self.setting], **self.engine}

    @property
    def has_whole_prompts(self) -> bool:
        """Whether the loop is refused where prompts are cut."""
        return self.loop.get("kv") == "reference" or self.loop.get("decode") == "bypass"

    @property
    def keeps_prefixes(self) -> bool:
        """Whether the prefix cache answers when prompts are asked again; vLLM has none for MLA on a CPU."""
        is_mla = self.family in MLA and self.setting != PLAIN_HEADS
        return not (self.has_whole_prompts or is_mla)

    def __str__(self):
        options = {**self.loop, **self.engine, **self.override}
        return "-".join([self.family, *(f"{key}={value}" for key, value in options.items()), self.setting])


SHARED, PER_STEP, REFERENCE = {}, {"kv": "per_step"}, {"kv": "reference"}
FROZEN = {"frozen_routing": True, "damping": 1.0}  # steps so long that they would change the choice of experts
POLICIES = (SHARED, PER_STEP)
# Detours that overlap and do not end where they began; layer 2 is left out.
PATH = {"span": None, "steps": None, "path": ((0, 2), (3, 5), (1, 2), (3, 6), (4, 5))}
LAYERS = {"mode": "layer", "anchor": 0.5, "norm_interpolation": True}
# `make test-vllm` serves FEW, at least one of each structure; `make record-vllm` MANY too. SLOW, half a minute to two
# each, only with SLOW=--with-slow.
FEW = [
    *(
        Case(family, kv)
        for family in ("llama", "gemma3_text", "qwen3_moe", "gpt_oss", "deepseek_v3")
        for kv in POLICIES
    ),
    Case("llama", REFERENCE),
    Case("llama", {"decode": "bypass", **REFERENCE}),
    Case("llama", override={"loop_steps": 2}),
    Case("llama", {**LAYERS, **PER_STEP}),
    Case("llama", {"span": ((1, 2), (3, 5)), "rule": "midpoint", **PER_STEP}),
    Case("llama", {"span": ((1, 2), (3, 5)), "steps": (2, 3)}),
    Case("llama", {**PATH, **PER_STEP}),
    Case("qwen3_moe", FROZEN),
    Case("gpt_oss", {**FROZEN, **REFERENCE}),
    Case("deepseek_v3", {**LAYERS, **FROZEN, **REFERENCE}),
    Case("deepseek_v3", FROZEN, PLAIN_HEADS),
    Case("qwen3_moe", {**FROZEN, **PER_STEP}, PARALLEL),
    Case("deepseek_v3", {**FROZEN, **PER_STEP}, PARALLEL),
    Case("llama", REFERENCE, COMPILED),
    Case("qwen3_moe", {**FROZEN, **PER_STEP}, COMPILED),
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
ALL_SPARSE = ("qwen3_moe", "gpt_oss", *SPARSE, *MLA)
# What the published cells do: they write each iterate's keys and values, and those of sparse models freeze routers.
PUBLISHED = [
    *(Case(family, REFERENCE) for family in ("qwen3", "gemma3_text")),
    *(Case(family, {**LAYERS, **FROZEN, **REFERENCE}) for family in ("qwen3_moe", "ernie4_5_moe", "deepseek_v2")),
]
SETTINGS = (PARALLEL, COMPILED)
MANY = [
    *(Case(family, kv) for family in (*DENSE, *SPARSE, "deepseek_v2", "glm4_moe_lite") for kv in POLICIES),
    *(Case(family, FROZEN) for family in ALL_SPARSE if family != "qwen3_moe"),
    *(Case(family, {**FROZEN, **PER_STEP}) for family in ("qwen3_moe", *MLA)),
    *(Case(family, kv, PLAIN_HEADS) for family in MLA for kv in POLICIES),
    *PUBLISHED,
    *(Case("qwen3", {"rule": rule, **options, **kv}) for rule, options in RULES.items() for kv in POLICIES),
    *(Case("qwen3_moe", {**LAYERS, **kv}) for kv in POLICIES),
    Case("llama", LAYERS),
    Case("llama", PATH),
    Case("llama", {**PATH, **REFERENCE}),
    Case("llama", {**PATH, **PER_STEP}, COMPILED),
    Case("qwen3_moe", {**PATH, **PER_STEP}),
    Case("deepseek_v3", {**PATH, **PER_STEP}),
    Case("gemma3_text", {"decode": "bypass"}),
]
EVERY = ("llama", *DENSE, *SPARSE, "gpt_oss", *MLA)
BIASED = "afmoe"  # has routers that torch.compile computes wrongly on a CPU, unless they are frozen
SLOW = [
    *(Case(family, kv, setting) for setting in SETTINGS for family in ("gemma3_text", "qwen3_moe") for kv in POLICIES),
    *(Case(family, SHARED, PARALLEL) for family in EVERY),
    *(Case(family, SHARED, COMPILED) for family in EVERY if family != BIASED),
    *(
        Case(family, FROZEN, setting)
        for setting in SETTINGS
        for family in ("qwen3_moe", "glm4_moe", "gpt_oss", BIASED, *MLA)
    ),
    *(Case("llama", PER_STEP, setting) for setting in SETTINGS),
]
# What the OpenAI server serves with two workers.
PARALLEL_SERVERS = [
    *(Case("llama", kv, PARALLEL) for kv in POLICIES),
    *(Case(family, {**FROZEN, **kv}, PARALLEL) for family in ("qwen3_moe", "deepseek_v3") for kv in POLICIES),
]
# What vLLM cannot do even for the base, by family and setting.
LACKING = {("phi3", PARALLEL): "view size is not compatible"}
REFUSED = [
    Case(
        "llama",
        REFERENCE,
        EAGER,
        {"enable_chunked_prefill": True},
        refusal="kv reference depends on where chunks start",
    ),
    Case("llama", {"decode": "bypass"}, refusal="decode bypass depends on where a prompt ends"),
    Case("llama", {"decode": "bypass", **PER_STEP}, refusal="decode bypass needs kv shared or reference"),
    Case("llama", {"decode": "first_n", "first_n": 2}, refusal="decode first_n depends on how many tokens"),
    Case("llama", {}, STAGES, refusal="a pipeline stage starts at layer 3, inside span 1:4"),
    Case("gpt2", refusal="family gpt2"),
    Case(BIASED, {}, COMPILED, refusal="on a CPU, torch.compile computes the routers of afmoe wrongly"),
]
# Families that vLLM's Transformers backend cannot serve even without a loop, and how that shows.
BASES = {
    "gpt2": "not initialized from checkpoint",
    "phimoe": "too many values to unpack",
    "minimax_m2": "AssertionError",
}


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
