"""Settings of vLLM's engine that a loop does not fit are refused while the model is built; tried without vLLM."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import transformers

from support.vllm_double import Engine

if transformers.__version__.startswith("4."):
    pytest.skip("vLLM runs models of transformers 5", allow_module_level=True)

WHOLE = {"enable_chunked_prefill": False, "enable_prefix_caching": False}
DRAFTS = {"speculative_config": SimpleNamespace(method="ngram")}
STAGES = {"pipeline_parallel_size": 2}  # of three layers each


@pytest.fixture(autouse=True)
def stages(monkeypatch):
    """What vLLM says about the stages of a pipeline."""
    utils: Any = ModuleType("vllm.distributed.utils")
    utils.get_pp_indices = lambda layers, stage, stages: (layers * stage // stages, layers * (stage + 1) // stages)
    monkeypatch.setitem(sys.modules, utils.__name__, utils)


@pytest.mark.parametrize(
    ("family", "loop", "changes", "reason"),
    [
        ("llama", {}, STAGES, "a pipeline stage starts at layer 3, inside span 1:4; choose stages with VLLM_PP_LAYER"),
        ("llama", {"span": ((0, 1), (2, 4))}, STAGES, "inside span 2:4"),
        ("granite", {"span": (3, 5)}, STAGES, r"multiplies its input by embedding_multiplier \(3.0\)"),
        ("granite", {"steps": 1}, STAGES, "multiplies its input by embedding_multiplier"),
        ("llama", {}, {"speculative_config": SimpleNamespace(method="eagle")}, "speculative decoding by eagle"),
        ("qwen3_moe", {}, {"enable_expert_parallel": True}, "ignore which experts a process has"),
        ("llama", {"kv": "reference"}, {**WHOLE, **DRAFTS}, "checks several at once; leave --speculative-config out"),
        ("llama", {"decode": "bypass"}, {**WHOLE, **DRAFTS}, "checks several at once; leave --speculative-config out"),
        ("llama", {"decode": "bypass"}, {**WHOLE, "data_parallel_size": 2}, "leave --data-parallel-size out"),
    ],
)
def test_settings_with_other_answers_are_refused(export_dir, monkeypatch, family, loop, changes, reason):
    with pytest.raises(ValueError, match=reason):
        Engine(export_dir(family, **loop), monkeypatch, **changes)


@pytest.mark.parametrize(
    ("loop", "changes"),
    [
        ({"span": (0, 3)}, STAGES),
        ({"span": ((0, 3), (3, 6))}, STAGES),
        ({"mode": "layer"}, STAGES),
        ({"steps": 1}, STAGES),
        ({}, DRAFTS),
        ({"kv": "per_step"}, {"lora_config": object(), "quant_config": object()}),
    ],
)
def test_settings_with_the_same_answers_are_accepted(export_dir, monkeypatch, loop, changes):
    Engine(export_dir("llama", **loop), monkeypatch, **changes)
