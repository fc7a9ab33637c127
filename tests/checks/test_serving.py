"""Serving on vLLM, as far as it can be told without vLLM; `test_vllm.py` has the rest."""

from __future__ import annotations

import importlib.util
import json
import math

import pytest

from loopexport.checks.vllm import Greedy, Served, first_difference, largest_logprob_difference, run_vllm
from loopexport.loop.spec import LoopSpec
from loopexport.templates.looped_vllm_limits import (
    VLLM_CPU_EAGER,
    VLLM_EXPERTS,
    VLLM_FAMILIES,
    VLLM_REFUSED,
    vllm_refusal,
)
from support.commands import run
from support.paths import VLLM_RECORDS


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_verify_says_in_a_line_that_vllm_is_missing(export_dir):
    result = run("verify", export_dir(), "--runtime", "vllm")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: vLLM is not installed for ")
    assert result.stderr.count("\n") == 1


def test_the_first_difference_is_named():
    prompts = [[5, 6], [7]]
    theirs = Greedy([[1, 2, 3], [4, 5, 6]], [[-0.5] * 3] * 2)
    assert first_difference([theirs, theirs], prompts, theirs) == ""
    assert largest_logprob_difference([theirs, theirs], theirs) == 0
    other = Greedy([[1, 2, 3], [4, 9, 9]], theirs.logprobs)
    expected = "prompt 1 (1 tokens): token 1 is 9 on vLLM, 5 with transformers"
    assert first_difference([theirs, other], prompts, theirs) == expected
    scaled = Greedy(theirs.tokens, [[-0.5] * 3, [-0.5, -0.25, math.nan]])
    expected = "prompt 1 (1 tokens): token 1 has log-probability -0.25 on vLLM, -0.5 with transformers"
    assert first_difference([theirs, scaled], prompts, theirs) == expected


def test_a_process_that_dies_is_told_for_every_run(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho out of luck\nexit 3\n")
    python.chmod(0o755)
    outcomes = run_vllm([{}, {}], python=str(python))
    assert [each.error for each in outcomes] == ["vLLM's process ended with status 3: out of luck"] * 2


@pytest.fixture
def served_with(monkeypatch):
    """`served_with(values)`: vLLM is taken to be installed and to answer this; returns what it was asked."""

    def pretend(**values):
        asked = []
        monkeypatch.setattr("loopexport.checks.vllm.find_spec", lambda name: True)
        monkeypatch.setattr("loopexport.checks.vllm.run_vllm", lambda runs: asked.extend(runs) or [answer])
        answer = Served(
            **{"answers": [], "cached": [], "error": "", "is_flag_error": False, "settings": "", "log": "", **values}
        )
        return asked

    return pretend


def test_verify_says_in_a_line_that_vllm_does_not_know_a_flag(export_dir, served_with):
    asked = served_with(error="unrecognized arguments: --max-modellen", is_flag_error=True)
    result = run("verify", export_dir(), "--runtime", "vllm", "--", "--max-modellen", "64")
    assert asked[0]["flags"] == ["--max-modellen", "64"]
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: vLLM does not accept --max-modellen 64: unrecognized arguments: --max-mod")
    assert result.stderr.count("\n") == 1


def test_verify_takes_flags_of_vllm_for_vllm_alone(export_dir):
    result = run("verify", export_dir(), "--", "--max-model-len", "64")
    assert result.exit_code == 2
    assert "--max-model-len 64 is for vLLM; add --runtime vllm, or leave it out" in result.stderr


def test_verify_serves_a_loop_with_the_flags_that_it_needs_and_then_those_that_are_given(export_dir, served_with):
    asked = served_with(error="stopped")
    for kv in ("shared", "reference"):
        assert run("verify", export_dir(kv=kv), "--runtime", "vllm", "--", "--block-size", "16").exit_code == 1
    shared, reference = (each["flags"] for each in asked)
    assert shared == ["--block-size", "16"]
    assert reference == ["--no-enable-chunked-prefill", "--no-enable-prefix-caching", *shared]
    assert "max_num_batched_tokens" in asked[0]["engine"].keys() - asked[1]["engine"].keys()


def cases_of(file):
    """The cases of a record; its other tests name no family."""
    return [each for each in json.loads(file.read_text())["results"].values() if "family" in each]


def test_the_template_serves_what_was_found_exact_and_nothing_else():
    newest = max(VLLM_RECORDS.glob("*.json"), key=lambda file: [int(part) for part in file.stem.split(".")])
    results = cases_of(newest)
    assert {each["family"] for each in results if each["outcome"] == "exact"} == set(VLLM_FAMILIES)
    others = json.loads(newest.read_text())["results"].values()
    assert {each["refused_family"] for each in others if "refused_family" in each} == set(VLLM_REFUSED)
    assert {each["experts_of"] for each in others if "experts_of" in each} >= set(VLLM_EXPERTS)
    compiled = [each for each in results if each["setting"] == "torch.compile"]
    assert {each["family"] for each in compiled if each["outcome"] == "refused"} == set(VLLM_CPU_EAGER)
    plain = [each for each in results if not each["loop"]]
    exact = {(each["family"], each["kv"]) for each in plain if each["outcome"] == "exact"}
    for family, kv in {(each["family"], each["kv"]) for each in plain}:
        assert (vllm_refusal(family, LoopSpec((1, 4), 3, kv=kv), {}) is None) == ((family, kv) in exact), (family, kv)


def test_no_release_differs_silently():
    results = [each for file in VLLM_RECORDS.glob("*.json") for each in cases_of(file)]
    assert {each["outcome"] for each in results} == {"exact", "refused"}
