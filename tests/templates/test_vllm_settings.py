"""Settings of vLLM's engine that a loop does not fit are refused while the model is built; tried without vLLM."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import transformers

import loopexport
from support.vllm_double import Engine
from support.walk_configs import save_tiny_family

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


COMPILED = {"enforce_eager": False}
ON_CUDA = {"device_type": "cuda"}


@pytest.fixture(scope="module")
def biased_routers(tmp_path_factory):
    """`biased_routers(**spec)`: the directory of an export whose routers have a bias."""
    base = save_tiny_family("afmoe", tmp_path_factory.mktemp("base") / "afmoe")

    def make(**spec):
        out = tmp_path_factory.mktemp("export") / "afmoe"
        return loopexport.convert(str(base), out, weights="copy", **{"span": (1, 4), "steps": 2, **spec}).root

    return make


@pytest.mark.parametrize("loop", [{}, {"kv": "per_step"}, {"mode": "layer"}])
def test_compiled_routers_with_a_bias_are_refused_on_a_cpu(biased_routers, monkeypatch, loop):
    with pytest.raises(ValueError, match="routers of afmoe wrongly in iterations; add --enforce-eager, or set loop_f"):
        Engine(biased_routers(**loop), monkeypatch, **COMPILED)


@pytest.mark.parametrize(
    ("loop", "changes"),
    [({}, {}), ({"frozen_routing": True}, COMPILED), ({"steps": 1}, COMPILED), ({}, {**COMPILED, **ON_CUDA})],
)
def test_other_routers_with_a_bias_are_accepted(biased_routers, monkeypatch, loop, changes):
    Engine(biased_routers(**loop), monkeypatch, **changes)
