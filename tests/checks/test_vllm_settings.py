"""Quantised bases, adapters, drafts and more than one process: served with the tokens that a loop has without them.

Needs an environment with vLLM, as `test_vllm.py` does. What keeps these tests from passing for nothing is said there;
besides, drafts that were accepted are counted, and each adapter has to change the answers.
"""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch

import loopexport
from loopexport.checks.vllm import (
    ENGINE,
    Greedy,
    answers_of_transformers,
    first_difference,
    run_vllm,
)
from support.quantised import as_awq, as_gptq, as_w8a8, by_compressed_tensors
from support.tiny import save_tiny
from support.vllm_bases import HEADS
from support.vllm_cases import LENGTHS, NEW_TOKENS, PROMPTS, draw_prompts
from support.vllm_extras import save_adapter, unrolled_checkpoint

PYTHON = os.environ.get("LOOPEXPORT_VLLM", "")
if not PYTHON:
    pytest.skip("needs vLLM; `make test-vllm` makes an environment with it", allow_module_level=True)

# vLLM's products of 4-bit matrices on a CPU need multiples of 32.
SHAPE = {**HEADS, "hidden_size": 128, "intermediate_size": 128}
TWO_PROCESSES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("base") / "llama", **SHAPE)


@pytest.fixture
def export(base, tmp_path):
    """`export(name, base, **spec)`: the directory of an export."""

    def make(name, of=base, **spec):
        options = {"span": (1, 4), "steps": 3, **spec}
        return loopexport.convert(str(of), tmp_path / name, weights="copy", **options).root

    return make


def serve(*models, calls=(PROMPTS,), environment=None, adapters=None, **engine):
    """The results of one process that serves these models, one after the other; none may have stopped."""
    options = {**ENGINE, "max_model_len": 192, **engine}
    run = {"calls": calls, "max_tokens": NEW_TOKENS, "adapters": adapters}
    runs = [{**run, "engine": {**options, "model": str(model)}} for model in models]
    variables = {"PYTHONPATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(environment or {})}
    served = run_vllm(runs, python=PYTHON, environment=variables)
    assert [each.error for each in served] == [""] * len(models)
    return served


def num_differences(ours: Greedy, theirs: Greedy) -> int:
    """How many prompts have other answers."""
    return sum(tokens != others for tokens, others in zip(ours.tokens, theirs.tokens, strict=True))


FORMATS = {
    "compressed-tensors int8": (as_w8a8, "float32"),
    "compressed-tensors fp8": (partial(as_w8a8, kind="float"), "bfloat16"),
    "awq": (as_awq, "bfloat16"),
    "gptq": (as_gptq, "bfloat16"),
    "compressed-tensors int4": (partial(by_compressed_tensors, num_bits=4), "bfloat16"),
    "compressed-tensors int4, asymmetric": (partial(by_compressed_tensors, num_bits=4, symmetric=False), "bfloat16"),
}
IN_SAMPLE = ("compressed-tensors int8", "awq")
FOUR_BITS = ("awq", "gptq", "compressed-tensors int4", "compressed-tensors int4, asymmetric")


@pytest.mark.parametrize(
    "kind", [kind if kind in IN_SAMPLE else pytest.param(kind, marks=pytest.mark.matrix) for kind in FORMATS]
)
def test_a_quantised_loop_is_its_unrolled_copy_and_one_step_is_the_base(base, export, tmp_path, kind):
    if kind in FOUR_BITS and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("vLLM multiplies 4-bit matrices only on CPUs with AVX-512")
    quantise, dtype = FORMATS[kind]
    quantised = quantise(base, tmp_path / "quantised")
    unrolled = unrolled_checkpoint(quantised, tmp_path / "unrolled", (0, *(1, 2, 3) * 2, 4, 5))
    naive = export("naive", quantised, steps=2, damping=1, kv="per_step")
    # vLLM would run its own classes for those without a loop, which round otherwise.
    ours, one, of_copy, of_base = (
        each.answers
        for each in serve(
            naive, export("one", quantised, steps=1), unrolled, quantised, dtype=dtype, model_impl="transformers"
        )
    )
    assert ours == of_copy
    assert one == of_base
    assert num_differences(ours[0], of_base[0]) == len(PROMPTS)


def test_requests_with_and_without_an_adapter_get_the_loop_of_the_merged_base(base, export, tmp_path):
    prompts = PROMPTS + draw_prompts(2)
    names = ["a", "", "b", "a", "", "b", "a", ""]
    adapters = {
        name: save_adapter(base, tmp_path / name, 8, seed, tmp_path / f"{name}-merged")
        for seed, name in enumerate(("a", "b"))
    }
    exports = {name: export(f"{name}-looped", tmp_path / f"{name}-merged") for name in adapters} | {"": export("plain")}
    theirs = {name: answers_of_transformers(root, prompts, NEW_TOKENS) for name, root in exports.items()}
    # On a CPU, vLLM gives requests without adapter the adapter of the last place, so one has to stay free.
    [served] = serve(
        exports[""],
        calls=[prompts] * 2,
        adapters=[str(adapters[name]) if name else None for name in names],
        enable_lora=True,
        max_loras=len(adapters) + 1,
        max_lora_rank=8,
    )
    expected = Greedy(
        [theirs[name].tokens[index] for index, name in enumerate(names)],
        [theirs[name].logprobs[index] for index, name in enumerate(names)],
    )
    assert not first_difference(served.answers, prompts, expected)
    for name in adapters:
        assert num_differences(theirs[name], theirs[""]) == len(prompts)


# After one token many times, many drafts are right; after random tokens hardly any is.
REPEATED = [[token] * length for token, length in zip((5, 9, 17, 33), LENGTHS, strict=True)]
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}


@pytest.mark.parametrize("kv", [pytest.param("shared", marks=pytest.mark.matrix), "per_step"])
def test_drafts_that_are_accepted_or_not_change_no_token(base, export, kv):
    root = export("out", kv=kv)
    [served] = serve(root, calls=[REPEATED] * 2, speculative_config=DRAFTS, disable_log_stats=False)
    theirs = answers_of_transformers(root, REPEATED, NEW_TOKENS)
    assert not first_difference(served.answers, REPEATED, theirs)
    assert num_differences(theirs, answers_of_transformers(base, REPEATED, NEW_TOKENS)) == len(REPEATED)
    drafted, accepted = served.drafts
    assert 0 < accepted < drafted


@pytest.mark.matrix
@pytest.mark.slow
def test_spans_within_the_stages_of_a_pipeline_are_those_of_transformers(base, export):
    """Compiled: without torch.compile, vLLM stops at the first prompt if a CPU runs more than one stage."""
    root = export("out", span=((0, 2), (3, 5)), kv="per_step")
    [served] = serve(root, environment=TWO_PROCESSES, pipeline_parallel_size=2, enforce_eager=False)
    assert not first_difference(served.answers, PROMPTS, answers_of_transformers(root, PROMPTS, NEW_TOKENS))
