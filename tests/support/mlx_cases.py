"""Loops that are compared between MLX and transformers."""

from __future__ import annotations

from dataclasses import dataclass, field

from loopexport.loop.spec import RULES, make_spec
from loopexport.templates.looped_spec import UNSTABLE_RULES
from support.rule_values import STEPS, VALUES
from support.tiny import SPAN


@dataclass(frozen=True)
class Case:
    """A loop on a family.

    Attributes:
        family: of the tiny base.
        loop: fields of the spec, beside a span and K.
    """

    family: str
    loop: dict = field(default_factory=dict)

    @property
    def fields(self) -> dict:
        """All loop fields of the config."""
        return {"loop_path": None, **make_spec(**{"span": SPAN, "steps": 3, **self.loop}).to_config_fields()}

    def __str__(self):
        return "-".join([self.family, *(f"{key}={value}" for key, value in self.loop.items())])


POLICIES = ({}, {"kv": "per_step"})
LAYERS = {"mode": "layer", "anchor": 0.5, "norm_interpolation": True}
FROZEN = {"frozen_routing": True, "damping": 1.0}  # steps so long that they would change the choice of experts
TWO_SPANS = {"span": ((1, 2), (3, 5))}
# Detours that overlap; detours that do not end where they began.
PATH = {"span": None, "steps": None, "path": ((0, 5), (1, 2), (3, 6), (4, 5))}
PATH_POLICIES = ({"kv": "shared"}, {"kv": "per_step"})
OVERLAPPING = {"span": None, "steps": None, "path": ((0, 4), (1, 5), (2, 6))}
# Rotary and learned positions, heads of their own width, sliding caches, experts, attention sinks, latents.
STRUCTURES = ("llama", "qwen3", "gemma3_text", "gpt2", "qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3")
RECURRENT = "lfm2_moe"  # a short convolution in every other layer
SPARSE = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3")
CASES = [
    *(Case(family, kv) for family in STRUCTURES for kv in POLICIES),
    *(Case(family, {**FROZEN, **kv}) for family in SPARSE for kv in POLICIES),
    *(Case("gemma3_text", {**LAYERS, **kv}) for kv in POLICIES),
    *(Case("qwen3_moe", {**LAYERS, **FROZEN, **kv}) for kv in POLICIES),
    *(Case("llama", {**TWO_SPANS, "anchor": 0.3, **kv}) for kv in POLICIES),
    Case("llama", {"damping": 1.0, "steps": 5}),
    Case("llama", {**TWO_SPANS, **LAYERS, "kv": "per_step", "rule": "euler"}),
    *(
        Case("qwen3", {"rule": rule, "steps": STEPS, **VALUES.get(rule, {}), **kv})
        for rule in RULES
        if rule not in (*UNSTABLE_RULES, "euler")
        for kv in POLICIES
    ),
    Case(RECURRENT, {"kv": "per_step"}),
    *(Case(family, {**PATH, **kv}) for family in ("llama", "gemma3_text", "qwen3_moe") for kv in PATH_POLICIES),
    *(Case("llama", {"span": ((1, 2), (3, 5)), "steps": (2, 3), **kv}) for kv in POLICIES),
    Case(RECURRENT, {**OVERLAPPING, "kv": "per_step"}),
]
