"""SmolLM2-135M-Instruct, the real model that `make demo` uses: it answers, and the examples run on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import loopexport
from support.commands import run
from support.compare import assert_bitwise, assert_differs
from support.evaluation import tokenized_base
from support.paths import EXAMPLES

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


@pytest.fixture(scope="module")
def cut(base, tmp_path_factory):
    """The looped model of the first 18 layers, for examples that need a real tokenizer and no sense."""
    root = tmp_path_factory.mktemp("cut")
    AutoModelForCausalLM.from_pretrained(base, num_hidden_layers=18).save_pretrained(root / "base")
    AutoTokenizer.from_pretrained(base).save_pretrained(root / "base")
    result = run("convert", root / "base", root / "looped", "--span", "13:17", "--steps", 3, "--weights", "hardlink")
    assert result.exit_code == 0, result.stderr
    return root / "looped"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A tiny random base, deep enough for the examples' span 13:17; they need no sense."""
    return tokenized_base("llama", tmp_path_factory.mktemp("small") / "base", num_hidden_layers=18)


@pytest.fixture(scope="module")
def small_looped(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    base = tokenized_base("llama", root / "base", num_hidden_layers=3)
    return loopexport.convert(base, root / "looped", span=(1, 2), steps=3).root


def test_answers_a_question_before_and_after(example, base, looped):
    """The looped model in a process of its own, as a user has it."""
    question = "What is the capital of France?"
    assert example("answer.py", base, question) == "LlamaForCausalLM: The capital of France is Paris.\n"
    command = [sys.executable, EXAMPLES / "answer.py", looped, question]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.stdout == "LoopedLlamaForCausalLM: The capital of France is Paris.\n", done.stderr


def test_verifies_in_full(looped):
    result = run("verify", looped)
    assert result.exit_code == 0, result.stdout
    assert result.stdout.count("ok ") == 12


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


def test_quickstart_example_runs(example, small, tmp_path):
    printed = example("quickstart.sh", small, tmp_path)
    assert "Dry run: nothing was written." in printed
    assert "cached decode equals the full forward" in printed
    assert (tmp_path / "base-again" / "model.safetensors").is_file()


def test_python_example_runs(example, small, tmp_path):
    printed = example("loop_from_python.py", small, tmp_path / "out")
    assert "4 layers, 1.44x the layer evaluations of the base" in printed
    assert printed.count("passed ") == 12
    assert "this failed, as it should: span 13:99 ends outside the model" in printed


def test_changing_steps_example_runs(example, small_looped):
    lines = example("change_steps.py", small_looped).splitlines()
    losses = [line.split("loss ")[1].split(",")[0] for line in lines if line.startswith("steps ")]
    assert len(set(losses)) == 4
    assert lines[-1].startswith("this failed, as it should: steps 0")


def test_lora_example_runs(example, cut, tmp_path):
    pytest.importorskip("peft")
    printed = example("lora.py", cut, tmp_path / "adapter")
    losses = [float(line.split("loss ")[1]) for line in printed.splitlines() if line.startswith("step ")]
    assert losses[-1] < losses[0] - 0.2
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


QUESTION = "Tell me a story about a lighthouse keeper."


HAS_ONNX = all(find_spec(name) for name in ("onnxruntime", "onnxscript"))
needs_onnx = pytest.mark.skipif(
    not HAS_ONNX or int(version("transformers").split(".")[0]) < 5, reason="ONNX export needs transformers 5"
)


@pytest.fixture(scope="module")
def with_graph(looped):
    """The looped model with its ONNX graph beside it."""
    result = run("onnx", looped, "--no-verify")
    assert result.exit_code == 0, result.stderr
    return looped


@pytest.fixture(scope="module")
def greedy_tokens(looped):
    """Prompt and 40 greedy tokens of torch."""
    tokenizer = AutoTokenizer.from_pretrained(looped, trust_remote_code=True)
    messages = [{"role": "user", "content": QUESTION}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(looped, trust_remote_code=True, dtype=torch.float32)
    new = model.generate(prompt, max_new_tokens=40, do_sample=False)[0, prompt.shape[1] :]
    return prompt[0].tolist(), new.tolist(), tokenizer.decode(new, skip_special_tokens=True)


@needs_onnx
def test_graph_verifies_against_torch(with_graph):
    from loopexport.onnx.check.comparison import check_graph

    spec = loopexport.open_export(with_graph).spec
    checks = check_graph(with_graph, with_graph / "model.onnx", spec, "fp32")
    assert [check.name for check in checks if check.passed] == [check.name for check in checks]
    assert "real text equals torch" in {check.name for check in checks}


@needs_onnx
def test_onnx_runtime_generates_the_greedy_tokens_of_torch(example, with_graph, greedy_tokens):
    _, _, text = greedy_tokens
    result = run("run", with_graph, QUESTION, "--max-new-tokens", 40, "--provider", "cpu")
    assert result.stdout == f"{text}\n"
    printed = example("onnx_generate.py", with_graph, QUESTION, 40)
    assert printed == f"{text}\n"


@needs_onnx
def test_onnxruntime_genai_generates_the_greedy_tokens_of_torch(example, with_graph, greedy_tokens):
    pytest.importorskip("onnxruntime_genai")
    _, new, text = greedy_tokens
    printed = example("onnx_genai.py", with_graph, QUESTION, 40)
    assert json.loads(printed.splitlines()[0]) == new
    assert printed.split("\n", 1)[1] == f"{text}\n"


@needs_onnx
def test_several_steps_example_runs(example, small_looped):
    lines = example("onnx_steps.py", small_looped, 2, 3).splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("K = ")] == ["K = 2", "K = 3"]
    assert lines[-1].startswith("weights written: 0 bytes")


CAPITALS = EXAMPLES / "items" / "capitals.jsonl"


def test_loop_that_destroys_the_model_is_worse_and_one_step_is_nothing(base):
    pytest.importorskip("lm_eval")
    settings = {"items": CAPITALS, "limit": 30, "device": "cpu", "dtype": "float32", "batch_size": 16}
    naive, one = loopexport.LoopSpec(span=(5, 25), steps=4, damping=1.0), loopexport.LoopSpec(span=(5, 25), steps=1)
    [row] = loopexport.compare(base, naive, **settings).comparisons
    assert (row.n, row.verdict) == (30, "worse")
    assert row.base > 0.8
    [row] = loopexport.compare(base, one, **settings | {"limit": 5}).comparisons
    assert (row.n, row.difference, row.gained, row.lost) == (5, 0, 0, 0)


def test_no_example_is_left_out():
    run_here = {"answer.py", "quickstart.sh", "loop_from_python.py", "change_steps.py", "lora.py"}
    run_here |= {"onnx_generate.py", "onnx_genai.py", "onnx_steps.py"}
    run_here |= {"publish.py"}  # by test_push.py
    run_here |= {"compare_items.sh", "scan.sh"}  # by evaluation/test_examples.py
    run_by_make = {"smollm2_checkpoint.py", "demo.sh"}  # the first makes this file's base, the second is `make demo`
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh")} == run_here | run_by_make
