"""Graphs that generate: cached decoding, decode modes, padding, other runtimes."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

import loopexport
import loopexport.onnx
from loopexport.onnx import OnnxModel, build
from loopexport.onnx.check.comparison import TOLERANCES, Scenario, load_torch
from loopexport.onnx.runtime.sampling import Sampling
from support.commands import run
from support.onnx_graphs import assert_equals_torch, largest_difference
from support.structure import by_class
from support.tiny import FAMILIES, VOCAB


@pytest.mark.parametrize("family", by_class(FAMILIES, ("llama",)))
def test_own_runner_generates_the_tokens_of_torch(graph, family):
    """Those of MLA too, whose keys and values of unequal width onnxruntime-genai cannot hold."""
    root = graph(family, steps=3)
    prompts = torch.randint(5, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
    ours = OnnxModel(root).generate(prompts.numpy(), max_new_tokens=12, eos_token_ids=())
    theirs = load_torch(root, 3).generate(prompts, max_new_tokens=12, do_sample=False, eos_token_id=-1)
    assert ours.tolist() == theirs[:, 9:].tolist()


@pytest.mark.parametrize(
    "spec",
    [{}, {"kv": "per_step"}, {"decode": "bypass"}, {"decode": "bypass", "kv": "per_step"}],
    ids=str,
)
@pytest.mark.parametrize("attention", ["portable", "gqa"])
def test_onnxruntime_genai_generates_the_tokens_of_torch(export_dir, traced, monkeypatch, tmp_path, attention, spec):
    """With gqa, past and present are one buffer there, which the iterations read while it is written."""
    genai = pytest.importorskip("onnxruntime_genai")
    monkeypatch.setattr(build, "trace_export", lambda export, *kind: traced("llama", *kind))
    root = shutil.copytree(export_dir("llama", **spec), tmp_path / "export")
    loopexport.onnx.export_onnx(root, attention=attention, verify=False)
    prompt, new = list(range(5, 20)), 30
    reference = load_torch(root, 3)
    theirs = reference.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=-1)[0]
    model = genai.Model(str(root))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + new, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    assert [int(token) for token in generator.get_sequence(0)] == theirs.tolist()


@pytest.mark.parametrize("attention", ["portable", "gqa"])
def test_onnxruntime_genai_goes_on_after_a_first_answer(export_dir, traced, monkeypatch, tmp_path, attention):
    """It loses the last token of the answer unless someone asks for its logits."""
    genai = pytest.importorskip("onnxruntime_genai")
    monkeypatch.setattr(build, "trace_export", lambda export, *kind: traced("llama", *kind))
    root = shutil.copytree(export_dir("llama"), tmp_path / "export")
    loopexport.onnx.export_onnx(root, attention=attention, verify=False)
    params = genai.GeneratorParams(model := genai.Model(str(root)))
    params.set_search_options(max_length=64, do_sample=False)
    generator, theirs = genai.Generator(model, params), []
    reference = load_torch(root, 3)
    for turn in ([5, 6, 7, 8, 9], [10, 11, 12]):
        if theirs:
            generator.get_logits()
        generator.append_tokens(turn)
        for _ in range(10):
            generator.generate_next_token()
        asked = torch.tensor([[*theirs, *turn]])
        theirs = reference.generate(asked, max_new_tokens=10, do_sample=False, eos_token_id=-1)[0].tolist()
    assert [int(token) for token in generator.get_sequence(0)] == theirs


BYPASSED = (
    {},
    {"kv": "per_step", "span": ((0, 2), (3, 5))},
    {"kv": "reference", "rule": "anderson"},
)
MORE_BYPASSED = (
    {"kv": "reference"},
    {"kv": "per_step"},
    {"kv": "reference", "mode": "layer", "anchor": 0.5},
    {"kv": "per_step", "rule": "uniform"},
)


@pytest.mark.parametrize(
    "spec",
    [*BYPASSED, *(pytest.param(spec, marks=pytest.mark.matrix) for spec in MORE_BYPASSED)],
    ids=lambda spec: "-".join(map(str, spec.values())),
)
def test_bypassed_decode_steps_equal_torch(graph, spec):
    assert_equals_torch(graph("llama", steps=3, decode="bypass", **spec))


@pytest.mark.parametrize("kv", ["shared", "per_step"])
def test_fused_attention_bypasses_decode_steps_too(graph, kv):
    assert_equals_torch(graph("llama", "gqa", steps=3, decode="bypass", kv=kv), padded=False)


def test_bypass_runs_decode_steps_as_the_base_and_others_looped(graph):
    """On one cache, that of the looped prompt: all else would only compare a graph with itself."""
    bypassed, full, base = (
        OnnxModel(graph("llama", **spec)) for spec in ({"decode": "bypass", "steps": 3}, {"steps": 3}, {"steps": 1})
    )
    prompt, token, chunk = np.arange(5, 12)[None], np.array([[7]]), np.array([[7, 8]])
    logits, cache = full.forward(prompt)
    assert np.array_equal(bypassed.forward(prompt)[0], logits)
    assert np.array_equal(bypassed.forward(token)[0], full.forward(token)[0])  # on an empty cache: no decode step
    assert np.array_equal(bypassed.forward(chunk, cache=cache)[0], full.forward(chunk, cache=cache)[0])
    decoded = bypassed.forward(token, cache=cache)[0]
    assert np.array_equal(decoded, base.forward(token, cache=cache)[0])
    assert np.abs(decoded - full.forward(token, cache=cache)[0]).max() > 1e-2


def test_decode_mode_that_counts_steps_is_refused(export_dir):
    export = export_dir("llama", decode="first_n", first_n=2)
    result = run("onnx", export, "--dry-run")
    assert result.exit_code == 1
    assert "decode first_n counts decode steps, and a graph cannot" in result.stderr
    assert run("onnx", export, "--dry-run", "--steps", "1").exit_code == 0


@pytest.mark.matrix
def test_padding_on_either_side_changes_no_token(graph):
    """Rows of a padded batch, left or right, generate what each generates alone, as torch does."""
    root = graph("gemma3_text", steps=3)
    model, reference = OnnxModel(root), load_torch(root, 3)
    rows = [np.arange(5, 14), np.arange(40, 44)]
    alone = [model.generate(row[None], max_new_tokens=6, eos_token_ids=())[0] for row in rows]
    theirs = [
        reference.generate(torch.from_numpy(row[None]), max_new_tokens=6, do_sample=False, eos_token_id=-1)[
            0, len(row) :
        ]
        for row in rows
    ]
    for ours, other in zip(alone, theirs, strict=True):
        assert ours.tolist() == other.tolist()
    for side in ("left", "right"):
        ids, mask = np.zeros((2, 9), np.int64), np.zeros((2, 9), np.int64)
        for index, row in enumerate(rows):
            place = slice(0, len(row)) if side == "right" else slice(9 - len(row), 9)
            ids[index, place], mask[index, place] = row, 1
        together = model.generate(ids, mask, max_new_tokens=6, eos_token_ids=())
        assert together.tolist() == [each.tolist() for each in alone], side


@pytest.mark.parametrize("family", by_class(("llama", "gemma3_text"), ("llama",)))
def test_forward_of_a_batch_padded_right_equals_torch(graph, family):
    """What follows the padding too: positions and masks go by the mask, not by the place in the batch."""
    mask = np.ones((2, 12), np.int64)
    mask[0, 4:7] = 0
    tokens = np.random.default_rng(1).integers(VOCAB // 2, size=mask.shape)
    scenario = Scenario("padded right", tokens, mask, (7, 1, 1, 3))
    assert largest_difference(graph(family, steps=3), scenario) <= TOLERANCES["fp32"]


def test_masked_rows_are_finite(graph):
    """A row of a padded token sees nothing: a softmax over nothing is NaN, and spreads through the cache."""
    model = OnnxModel(graph("llama", steps=3))
    mask = np.array([[0, 0, 0, 1, 1]])
    logits, cache = model.forward(np.array([[5, 6, 7, 8, 9]]), mask)
    assert np.isfinite(logits).all()
    assert all(np.isfinite(value.numpy()).all() for value in cache.values.values())


def test_sampling_keeps_to_what_is_allowed():
    logits, random = np.log(np.array([[0.5, 0.3, 0.15, 0.05]])), np.random.default_rng(0)

    def drawn(**options):
        return {int(Sampling(**options).choose(logits, random)[0]) for _ in range(200)}

    assert drawn() == {0}
    assert drawn(temperature=1.0) == {0, 1, 2, 3}
    assert drawn(temperature=1.0, top_k=2) == {0, 1}
    assert drawn(temperature=1.0, top_p=0.7) == {0, 1}
    with pytest.raises(loopexport.LoopExportError, match="temperature -1"):
        Sampling(temperature=-1)
