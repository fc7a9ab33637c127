"""SmolLM2-135M-Instruct, the real model that `make demo` uses: it answers, and the examples run on it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compare import assert_bitwise, assert_differs
from test_convert import run
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = pytest.mark.skipif(
    "LOOPEXPORT_SMOLLM" not in os.environ, reason="needs SmolLM2; `make test` makes it and sets LOOPEXPORT_SMOLLM"
)


@pytest.fixture(scope="module")
def base():
    return Path(os.environ["LOOPEXPORT_SMOLLM"])


@pytest.fixture(scope="module")
def looped(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("real") / "looped"
    result = run("convert", base, out, "--span", "13:17", "--steps", 3, "--weights", "hardlink")
    assert result.exit_code == 0, result.stderr
    return out


def example(*command):
    """Run an example as a user would, and give back what it printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [str(part) for part in command]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert done.returncode == 0, done.stderr
    return done.stdout


def answer(directory):
    return example(sys.executable, EXAMPLES / "answer.py", directory, "What is the capital of France?")


def test_answers_a_question_before_and_after(base, looped):
    assert answer(base) == "LlamaForCausalLM: The capital of France is Paris.\n"
    assert answer(looped) == "LoopedLlamaForCausalLM: The capital of France is Paris.\n"


def test_verifies_in_full(looped):
    result = run("verify", looped)
    assert result.exit_code == 0, result.stdout
    assert result.stdout.count("ok ") == 7


def test_tokenizer_is_the_bases(base, looped):
    theirs, ours = (AutoTokenizer.from_pretrained(path, trust_remote_code=True) for path in (base, looped))
    text = "It's 12345 o'clock,\n\n   naïve <|im_start|>user"
    assert type(ours) is type(theirs)
    assert ours(text).input_ids == theirs(text).input_ids
    assert ours.chat_template == theirs.chat_template


def test_identities_are_bitwise_and_the_loop_is_not_idle(base, looped):
    tokens = AutoTokenizer.from_pretrained(base)(
        "The lighthouse keeper climbed the stairs", return_tensors="pt"
    ).input_ids
    theirs = AutoModelForCausalLM.from_pretrained(base)
    ours = AutoModelForCausalLM.from_pretrained(looped, trust_remote_code=True)
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert_differs(ours(tokens).logits, expected)
        for field, value in (("loop_steps", 1), ("loop_anchor", 1.0)):
            before = getattr(ours.config, field)
            setattr(ours.config, field, value)
            assert_bitwise(ours(tokens).logits, expected)
            setattr(ours.config, field, before)


def test_quickstart_example_runs(base, tmp_path):
    printed = example("bash", EXAMPLES / "quickstart.sh", base, tmp_path)
    assert "Dry run: nothing was written." in printed
    assert "cached decode equals the full forward" in printed
    assert (tmp_path / "base-again" / "model.safetensors").is_file()


def test_python_example_runs(base, tmp_path):
    printed = example(sys.executable, EXAMPLES / "loop_from_python.py", base, tmp_path / "out")
    assert "4 layers, 1.27x the layer evaluations of the base" in printed
    assert printed.count("passed ") == 7
    assert "as it should, this failed: span 13:99 ends outside the model" in printed


def test_changing_steps_example_runs(looped):
    lines = example(sys.executable, EXAMPLES / "change_steps.py", looped).splitlines()
    losses = [line.split("loss ")[1].split(",")[0] for line in lines if line.startswith("steps ")]
    assert len(set(losses)) == 4
    assert lines[-1].startswith("as it should, this failed: steps 0")


def test_lora_example_runs(looped, tmp_path):
    pytest.importorskip("peft")
    printed = example(sys.executable, EXAMPLES / "lora.py", looped, tmp_path / "adapter")
    losses = [float(line.split("loss ")[1]) for line in printed.splitlines() if line.startswith("step ")]
    assert losses[-1] < losses[0] - 0.2
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_no_example_is_left_out():
    run_here = {"answer.py", "quickstart.sh", "loop_from_python.py", "change_steps.py", "lora.py"}
    run_by_make = {"smollm2_checkpoint.py", "demo.sh"}  # the first makes this file's base, the second is `make demo`
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == run_here | run_by_make
