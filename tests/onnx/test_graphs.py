"""ONNX graphs against the export in torch: every family, K, policy and rule, from one trace of each family."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

import loopexport
import loopexport.onnx
from loopexport.base import families
from loopexport.onnx import OnnxModel, build, plan_onnx
from loopexport.onnx import plan as planning
from loopexport.onnx.check import TOLERANCES, Scenario, load_torch, make_scenarios, run_graph, run_torch
from loopexport.onnx.graph.bind_weights import stored_bytes
from loopexport.onnx.runtime.sampling import Sampling
from loopexport.onnx.trace.expressible import Expressible
from loopexport.onnx.trace.simplify import optimise
from support.commands import checks, run, tree
from support.damage import edit_config, flip_last_byte
from support.family_walk import RELEASE, save_tiny_family
from support.onnx_walk import walk_onnx, walked_families
from support.tiny import FAMILIES, MOE_FAMILIES, SPAN, VOCAB

# The others take as long again, and go with the matrix.
QUICK_FAMILIES = ("llama", "qwen3", "gemma3_text", "gpt2", "qwen3_moe", "deepseek_v3")
# What GroupQueryAttention cannot do, and what then is said.
BEYOND_FUSED = {
    "deepseek_v2": "changes keys behind the cache",
    "deepseek_v3": "changes keys behind the cache",
    "gpt_oss": "has no sinks",
}
# Rotary embeddings whose frequencies change at a length that the compared inputs cross.
LENGTH_8 = {"max_position_embeddings": 8}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
FACTORS = [1.0 + 0.1 * index for index in range(8)]
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 1.0,
    "original_max_position_embeddings": 8, "short_factor": FACTORS, "long_factor": [3 * each for each in FACTORS],
}  # fmt: skip
LOOPS = (  # the first three for every family, all for a few
    {"steps": 1},
    {"steps": 6},
    {"steps": 2, "kv": "per_step"},
    {"steps": 2},
    {"steps": 3, "kv": "reference"},
    {"steps": 3, "mode": "layer", "anchor": 0.5, "norm_interpolation": True},
)
RULES = (
    {"rule": "residual_scaled"},
    {"rule": "ema"},
    {"rule": "ema_sched", "schedule": (0.5, 0.25, 0.75, 0.1)},
    {"rule": "midpoint"},
    {"rule": "heun"},
    {"rule": "rk4"},
    {"rule": "heavy_ball"},
    {"rule": "aitken"},
    {"rule": "norm_stab"},
    {"rule": "poly_blend", "schedule": (0.1, 0.2, 0.3, 0.3, 0.1)},
    {"rule": "input_anchor"},
    {"rule": "uniform"},
    {"rule": "uniform", "mode": "layer", "kv": "per_step"},
    {"rule": "anderson", "kv": "reference"},
    {"rule": "euler", "span": ((0, 2), (3, 5)), "kv": "per_step"},
    {"rule": "euler", "span": ((0, 1), (2, 5)), "anchor": 0.25},
)


def largest_difference(root, scenario):
    """Of the logits' scale, between a graph and torch, where tokens are not padding."""
    spec = loopexport.open_export(root).spec
    return _difference(OnnxModel(root), load_torch(root, spec.steps), scenario)


def _difference(graph, model, scenario):
    ours, theirs = run_graph(graph, scenario), run_torch(model, scenario)
    visible = scenario.mask.astype(bool)
    return float(np.abs(ours - theirs)[visible].max() / np.abs(theirs[visible]).max())


def assert_equals_torch(root, padded=True):
    for scenario in make_scenarios(VOCAB, loopexport.open_export(root).spec):
        if not (padded or scenario.mask.all()):
            continue
        difference = largest_difference(root, scenario)
        assert difference <= TOLERANCES["fp32"], f"{scenario.name}: {difference:.3g} of the logits' scale"


QUICK_FUSED = ("llama", "gemma3_text")


def quickly(families, quick=QUICK_FAMILIES):
    """Families as pytest takes them: all but those of `quick` go with the matrix."""
    return [each if each in quick else pytest.param(each, marks=pytest.mark.matrix) for each in sorted(families)]


@pytest.mark.parametrize("family", quickly(FAMILIES))
def test_graph_equals_torch(graph, plain, family):
    roots = []
    for spec in LOOPS if family in QUICK_FAMILIES else LOOPS[:3]:
        frozen = {"frozen_routing": True} if family in MOE_FAMILIES and "mode" in spec else {}
        roots.append(graph(family, **spec, **frozen))
        assert_equals_torch(roots[-1])
    for scenario in make_scenarios(VOCAB, loopexport.open_export(roots[0]).spec):
        difference = _difference(OnnxModel(roots[0]), plain(family), scenario)
        assert difference <= TOLERANCES["fp32"], f"one step is the base, {scenario.name}: {difference:.3g}"
    tokens = make_scenarios(VOCAB, loopexport.open_export(roots[0]).spec)[0]
    base, looped = (run_graph(OnnxModel(root), tokens) for root in roots[:2])
    assert np.abs(base - looped).max() > 1e-2 * np.abs(base).max(), "the loop is idle, so that equality means nothing"


def test_tables_of_fixed_length_are_read_at_any_length(tmp_path):
    """GPT-Neo cuts its masks, local ones too, out of a table for all positions."""
    fields = {"num_layers": 4, "num_hidden_layers": 4, "attention_types": [[["global", "local"], 2]]}
    assert str(walk_onnx("gpt_neo", tmp_path, **fields)[0]) == "works"


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {**LENGTH_8, "rope_parameters": DYNAMIC}),
        ("phi3", {"original_max_position_embeddings": 8, "rope_parameters": LONGROPE}),
    ],
)
def test_rotary_frequencies_that_depend_on_the_length_do_so_in_the_graph(tmp_path, family, fields):
    assert str(walk_onnx(family, tmp_path, num_hidden_layers=4, **fields)[0]) == "works"
    prompt = torch.tensor([[5, 6, 7, 8, 9]])
    ours = OnnxModel(tmp_path / "out").generate(prompt.numpy(), max_new_tokens=12, eos_token_ids=())
    theirs = load_torch(tmp_path / "out", 3).generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=-1)
    assert ours.tolist() == theirs[:, 5:].tolist()


def test_code_that_depends_on_values_is_refused(tmp_path):
    """PhiMoE scales its rotations by a branch on the largest position."""
    rope = {**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.3}
    outcome, _ = walk_onnx("phimoe", tmp_path, num_hidden_layers=4, rope_parameters=rope)
    assert str(outcome).startswith("refused: what its code does depends on values that it computed")


def test_pairs_rotate_as_complex_numbers():
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import apply_rotary_emb

    query, key = torch.randn(2, 4, 3, 8), torch.randn(2, 1, 3, 8)
    angles = torch.rand(2, 3, 4) * 6
    rotated = apply_rotary_emb(query, key, torch.polar(torch.ones_like(angles), angles) * 2.0)
    with Expressible():
        ours = apply_rotary_emb(query, key, torch.polar(torch.ones_like(angles), angles) * 2.0)
    for mine, theirs in zip(ours, rotated, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_numbers_near_0_and_1_survive_optimisation():
    """onnxscript's optimiser takes an epsilon of 1e-8 for 0, and drops it; exactly 0 and 1 are worth dropping."""

    class Model(torch.nn.Module):
        def forward(self, x):
            return (x + 1e-8) * 1.000001 + 0.0

    program = torch.export.export(Model(), (torch.zeros(3),))
    model = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False).model
    optimise(model)
    assert sorted(node.op_type for node in model.graph if node.op_type != "Identity") == ["Add", "Mul"]
    assert len(model.graph.inputs) == 1


@pytest.mark.matrix
@pytest.mark.parametrize("family", walked_families())
def test_every_family_that_can_be_looped_comes_out_as_recorded(family, tmp_path):
    """`walk_onnx` itself fails where a graph does not equal torch."""
    outcome, _ = walk_onnx(family, tmp_path)
    if families.releases()[0] == RELEASE:
        assert outcome.status == families.onnx_outcome(family)[0], str(outcome)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(map(str, rule.values())))
def test_every_rule_equals_torch(graph, rule):
    assert_equals_torch(graph("llama", steps=4, **rule))


@pytest.mark.parametrize("family", quickly(FAMILIES.keys() - BEYOND_FUSED.keys(), QUICK_FUSED))
def test_fused_attention_equals_torch(graph, family):
    """GroupQueryAttention: iterations under `shared` read the natural cache and add no key to it."""
    for spec in LOOPS[:5] if family in QUICK_FUSED else LOOPS[:3]:
        root = graph(family, "gqa", **spec)
        assert_equals_torch(root, padded=False)
        fused = [node for node in ir.load(root / "model.onnx").graph if node.op_type == "GroupQueryAttention"]
        assert len(fused) == 6 + (spec["steps"] - 1) * 3


def test_fused_attention_refuses_what_it_would_get_wrong(graph):
    model = OnnxModel(graph("llama", "gqa", steps=3))
    ids = np.array([[5, 6, 7], [8, 9, 10]])
    with pytest.raises(loopexport.LoopExportError, match="takes no padded batch"):
        model.forward(ids, np.array([[0, 1, 1], [1, 1, 1]]))
    _, cache = model.forward(ids)
    with pytest.raises(loopexport.LoopExportError, match="takes 3 tokens for a single prompt only"):
        model.forward(ids, cache=cache)


@pytest.mark.parametrize("family", quickly(FAMILIES, quick=("gemma3_text", "deepseek_v3")))
def test_own_runner_generates_the_tokens_of_torch(graph, family):
    """Those of MLA too, whose keys and values of unequal width onnxruntime-genai cannot hold."""
    root = graph(family, steps=3)
    prompts = torch.randint(5, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
    ours = OnnxModel(root).generate(prompts.numpy(), max_new_tokens=12, eos_token_ids=())
    theirs = load_torch(root, 3).generate(prompts, max_new_tokens=12, do_sample=False, eos_token_id=-1)
    assert ours.tolist() == theirs[:, 9:].tolist()


@pytest.mark.parametrize("spec", [{}, {"kv": "per_step"}, {"decode": "bypass"}], ids=str)
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


@pytest.mark.parametrize(("family", "says"), BEYOND_FUSED.items())
def test_families_beyond_fused_attention_are_refused(export_dir, family, says):
    with pytest.raises(loopexport.LoopExportError, match=says):
        build.trace_export(loopexport.open_export(export_dir(family)), "fp32", "gqa")


def test_weights_of_every_k_are_the_stored_bytes_once(export_dir, traced):
    """Tied and experts' weights included: no byte is written, and none is read twice."""
    for family in ("qwen3", "qwen3_moe"):
        plan = plan_onnx(export_dir(family))
        read = [
            stored_bytes(build.build_graph(plan, plan.export, *traced(family), spec, {}))
            for spec in (plan.export.spec, replace(plan.export.spec, steps=1), replace(plan.export.spec, steps=6))
        ]
        assert read[0] == read[1] == read[2]
        tensors = plan.export.base.tensors.values()
        assert sum(read[0].values()) == sum(each.nbytes for each in tensors)
        assert {start for _, start in read[0]} == {each.start for each in tensors}


def test_shared_iterations_project_no_keys(export_dir, traced):
    """Under `shared` a copy of a layer has two products less: those of its keys and of its values."""

    def products(**spec):
        plan = plan_onnx(export_dir("llama", **spec))
        model = build.build_graph(plan, plan.export, *traced("llama"), plan.export.spec, {})
        return sum(node.op_type == "MatMul" for node in model.graph)

    width, base = SPAN[1] - SPAN[0], products(steps=1)
    assert products(steps=3) - base == 2 * width * 5
    assert products(steps=3, kv="per_step") - base == 2 * width * 7


def test_tied_head_reads_the_embedding_as_it_is_stored(graph):
    """ONNX Runtime folds `Transpose(W)` into a second copy; what it would run is looked at after its optimisation."""
    root = graph("qwen3", steps=2)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(root / "optimised.onnx")
    ort.InferenceSession(str(root / "model.onnx"), options, providers=["CPUExecutionProvider"])
    optimised = ir.load(root / "optimised.onnx").graph
    vocab_sized = [name for name, value in optimised.initializers.items() if VOCAB in value.const_value.shape.numpy()]
    assert vocab_sized == ["model.embed_tokens.weight"]


def test_graph_is_valid_and_readable(graph):
    root = graph("llama", steps=3)
    onnx = pytest.importorskip("onnx")
    onnx.checker.check_model(str(root / "model.onnx"))
    model = ir.load(root / "model.onnx")
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)
    assert "model.layers.2.mlp.down_proj/MatMul_1" in names
    assert "model.layers.2.mlp.down_proj/MatMul_1/pass3" in names
    assert not [node for node in model.graph if node.domain == "loopexport"]
    inputs = {value.name: [str(size) for size in value.shape] for value in model.graph.inputs}
    assert list(inputs)[:5] == [
        "input_ids", "attention_mask", "position_ids", "past_key_values.0.key", "past_key_values.0.value"
    ]  # fmt: skip
    assert inputs["past_key_values.0.key"] == ["batch_size", "2", "past_sequence_length", "16"]
    assert inputs["attention_mask"] == ["batch_size", "total_sequence_length"]
    outputs = [value.name for value in model.graph.outputs]
    assert outputs[:3] == ["logits", "present.0.key", "present.0.value"]


def test_per_step_has_a_slot_for_each_pass(graph):
    model = OnnxModel(graph("llama", steps=3, kv="per_step"))
    slots = [name for name in model.empty_cache(1).values if name.endswith(".key")]
    assert slots == [f"past_key_values.{slot}.key" for slot in range(6 + 2 * 3)]


BYPASSED = (
    {},
    {"kv": "reference"},
    {"kv": "per_step"},
    {"kv": "per_step", "span": ((0, 2), (3, 5))},
    {"kv": "reference", "mode": "layer", "anchor": 0.5},
    {"kv": "reference", "rule": "anderson"},
    {"kv": "per_step", "rule": "uniform"},
)


@pytest.mark.parametrize("spec", BYPASSED, ids=lambda spec: "-".join(map(str, spec.values())))
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


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
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


# ---------------------------------------------------------------------------------------------------------------------
# The command.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def export(export_dir, tmp_path):
    """A copy of an export that a test may write into."""
    return shutil.copytree(export_dir("llama"), tmp_path / "export")


@pytest.fixture
def one_trace(traced, monkeypatch):
    """Lets the command use the session's traces."""
    monkeypatch.setattr(build, "trace_export", lambda export, *kind: traced("llama", *kind))


def test_dry_run_writes_nothing(export):
    before = tree(export)
    result = run("onnx", export, "--steps", "2,4", "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "model_k2.onnx (K = 2), model_k4.onnx (K = 4)" in result.stdout
    assert "0 bytes written" in result.stdout
    assert tree(export) == before


def test_command_writes_graphs_beside_untouched_weights_and_verifies_them(export, one_trace):
    before = tree(export)
    result = run("onnx", export, "--steps", "1,3", "--json")
    assert result.exit_code == 0, result.stderr
    values = json.loads(result.stdout)
    assert values["written"]
    assert {name for name, each in values["checks"].items() if all(check["passed"] for check in each)} == {
        "model.onnx", "model_k1.onnx"
    }  # fmt: skip
    after = tree(export)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"model.onnx", "model_k1.onnx", "genai_config.json", "loopexport.json", "README.md"}
    record = json.loads((export / "loopexport.json").read_text())["onnx"]["model.onnx"]
    assert 0 < record["difference"] < TOLERANCES["fp32"]
    assert record["data"] == ["model.safetensors"]
    assert checks(export, "--files-only")[1] == 0


def test_out_is_a_whole_export_with_graphs(export, one_trace, tmp_path):
    before = tree(export)
    result = run("onnx", export, "--out", tmp_path / "out", "--no-verify")
    assert result.exit_code == 0, result.stderr
    assert tree(export) == before
    assert checks(tmp_path / "out")[1] == 0
    assert OnnxModel(tmp_path / "out").generate(np.array([[5, 6]]), max_new_tokens=2).shape == (1, 2)
    assert "model.onnx: K = 3, fp32, attention portable" in run("inspect", tmp_path / "out").stdout
    assert "use --overwrite" in run("onnx", export, "--out", tmp_path / "out", "--no-verify").stderr
    again = run("onnx", export, "--out", tmp_path / "out", "--no-verify", "--overwrite", "--steps", "2")
    assert again.exit_code == 0, again.stderr
    assert [path.name for path in (tmp_path / "out").glob("*.onnx")] == ["model_k2.onnx"]


def test_other_dtype_writes_one_data_file_for_every_k(export, traced, monkeypatch):
    monkeypatch.setattr(build, "trace_export", lambda export, *kind: traced("llama", *kind))
    result = run("onnx", export, "--steps", "1,3", "--dtype", "fp16", "--json")
    assert result.exit_code == 0, result.stdout + result.stderr
    values = json.loads(result.stdout)
    worst = max(check["difference"] for each in values["checks"].values() for check in each)
    assert 1e-5 < worst < TOLERANCES["fp16"]
    assert sorted(path.name for path in export.glob("*.onnx_data")) == ["model_fp16.onnx_data"]
    written = (export / "model_fp16.onnx_data").stat()
    assert run("onnx", export, "--steps", "2", "--dtype", "fp16").exit_code == 0
    assert (export / "model_fp16.onnx_data").stat().st_mtime_ns == written.st_mtime_ns
    assert checks(export, "--files-only", "--full")[1] == 0
    flip_last_byte(export / "model_fp16.onnx_data")
    outcome, status = checks(export, "--files-only", "--full")
    assert status == 1
    assert outcome["ONNX files are as written"]["detail"] == "model_fp16.onnx_data has changed (xxh3_128)"


def test_progress_counts_the_bytes_that_are_written(export, traced, monkeypatch):
    monkeypatch.setattr(build, "trace_export", lambda export, *kind: traced("llama", *kind))
    counts, lines = [], []
    loopexport.export_onnx(export, dtype="fp16", verify=False, say=lines.append, progress=counts.append)
    assert 0 < sum(counts) <= (export / "model_fp16.onnx_data").stat().st_size
    assert lines == ["tracing the model", "writing model_fp16.onnx_data", "unrolling model_fp16.onnx"]


def test_card_tells_of_the_graphs_until_somebody_edits_it(export, one_trace):
    assert run("onnx", export, "--no-verify").exit_code == 0
    card = (export / "README.md").read_text()
    assert "| `model.onnx` | 3 | fp32 | portable | `model.safetensors` |" in card
    edit_config(export, loop_steps=4)
    assert run("onnx", export, "--no-verify").exit_code == 0
    assert "| `model.onnx` | 4 | fp32 |" in (export / "README.md").read_text()
    (export / "README.md").write_text(card + "mine\n")
    result = run("onnx", export, "--no-verify", "--steps", "2")
    assert "README.md was edited, so it stays as it is" in result.stderr
    assert (export / "README.md").read_text() == card + "mine\n"


def test_card_of_a_run_that_was_stopped_before_it_was_recorded_is_no_edit(export, one_trace):
    manifest = (export / "loopexport.json").read_bytes()
    assert run("onnx", export, "--no-verify").exit_code == 0
    done = (export / "loopexport.json").read_bytes()
    (export / "loopexport.json").write_bytes(manifest)
    result = run("onnx", export, "--no-verify")
    assert "was edited" not in result.stderr
    assert (export / "loopexport.json").read_bytes() == done


def build_otherwise(monkeypatch):
    """Let graphs be made of another loop than they say that they are of."""
    real = build.build_graph

    def build_other(plan, export, skeleton, trace, spec, layout):
        model = real(plan, export, skeleton, trace, replace(spec, anchor=0.01), layout)
        model.metadata_props["loop_anchor"] = str(spec.anchor)
        return model

    monkeypatch.setattr(build, "build_graph", build_other)


def test_graph_that_differs_from_torch_is_not_kept_and_nothing_is_lost(export, one_trace, monkeypatch):
    assert run("onnx", export, "--no-verify").exit_code == 0
    before = tree(export)
    build_otherwise(monkeypatch)
    result = run("onnx", export)
    assert result.exit_code == 1
    assert "FAIL a batch, prefilled and decoded, equals torch: largest difference" in result.stdout
    assert "model.onnx not kept: a check failed" in result.stdout
    assert tree(export) == before


def test_verify_runs_the_graphs(export, one_trace, monkeypatch):
    assert run("onnx", export, "--steps", "1,3", "--no-verify").exit_code == 0
    outcome, status = checks(export)
    assert status == 0
    for name in ("model.onnx", "model_k1.onnx"):
        assert 0 < outcome[f"{name} computes what torch does"]["difference"] < TOLERANCES["fp32"]
    build_otherwise(monkeypatch)
    assert run("onnx", export, "--no-verify").exit_code == 0
    outcome, status = checks(export)
    assert status == 1
    assert outcome["ONNX files are as written"]["passed"]
    assert not outcome["model.onnx computes what torch does"]["passed"]
    assert outcome["model_k1.onnx computes what torch does"]["passed"]


ONNX_DAMAGE = {
    "graph": (lambda root: flip_last_byte(root / "model.onnx"), "model.onnx has changed (sha256)"),
    "missing graph": (lambda root: (root / "model.onnx").unlink(), "model.onnx is missing"),
    "genai": (lambda root: (root / "genai_config.json").write_text("{}"), "genai_config.json has changed (size)"),
    "missing data": (
        lambda root: (root / "model.safetensors").unlink(),
        "model.safetensors is missing; model.onnx needs it",
    ),
}


@pytest.mark.parametrize("kind", ONNX_DAMAGE)
def test_damage_to_onnx_files_is_noticed(export, one_trace, kind):
    assert run("onnx", export, "--no-verify").exit_code == 0
    damage, says = ONNX_DAMAGE[kind]
    damage(export)
    outcome, status = checks(export, "--files-only")
    assert status == 1
    assert outcome["ONNX files are as written"]["detail"] == says


def test_bf16_is_written_but_not_verified_without_cuda(tiny_base, tmp_path):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tiny_base("llama"), dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    loopexport.convert(str(tmp_path / "base"), tmp_path / "out", span=SPAN, steps=2)
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("there is CUDA")
    result = run("onnx", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "for the CPU use --dtype fp32 or fp16" in result.stdout
    assert "n/a  the graph equals torch: not compared: bf16 runs on CUDA only" in result.stdout
    with pytest.raises(loopexport.LoopExportError, match="a graph in bf16 runs on CUDA only"):
        OnnxModel(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--steps", "0"], "steps 0 must be a whole number of 1 or more"),
        (["--steps", "two"], "is not a list of whole numbers such as 2,4,8"),
        (["--dtype", "int8"], "'int8' is not one of"),
    ],
)
def test_bad_options_are_told(export, options, says):
    result = run("onnx", export, *options)
    assert result.exit_code in (1, 2)
    assert says in result.stderr


def test_family_that_cannot_be_traced_is_refused_with_the_reason(tmp_path):
    """Doge masks otherwise from a number of tokens on."""
    base = save_tiny_family("doge", tmp_path / "base")
    export = loopexport.convert(str(base), tmp_path / "out", span=(1, 3), steps=2).root
    before = tree(export)
    result = run("onnx", export)
    assert result.exit_code == 1
    assert "family 'doge' cannot be traced to ONNX: its code takes different paths for different" in result.stderr
    assert tree(export) == before


def test_recurrent_layers_outside_of_the_span_are_refused_at_once(tmp_path):
    base = save_tiny_family("qwen3_next", tmp_path / "base")
    export = loopexport.convert(str(base), tmp_path / "out", span=(3, 4), steps=2).root
    says = "layer 0 keeps the state of a recurrence or convolution in its cache, for which an ONNX graph has no input"
    assert says in run("onnx", export, "--dry-run").stderr


def test_window_that_only_the_cache_knows_is_refused(tmp_path):
    """Moshi masks nothing: torch's cache drops old keys, beyond the lengths that verification compares."""
    outcome, _ = walk_onnx("moshi", tmp_path, sliding_window=3000)
    assert outcome.status == "refused"
    assert "its cache forgets all but the last 3000 tokens, and no mask of its code says so" in outcome.reason


def test_quantised_base_is_refused(export):
    config = json.loads((export / "base" / "config.json").read_text())
    (export / "base" / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    assert "the base is quantised; ONNX export needs" in run("onnx", export).stderr


def test_missing_graph_and_provider_are_told(export, graph):
    assert "no ONNX graph in" in run("run", export, "Hello").stderr
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        result = run("run", graph("llama", steps=2), "Hello", "--provider", "cuda")
        assert (result.exit_code, "CUDA is not available to ONNX Runtime" in result.stderr) == (1, True)


def test_no_tensor_is_the_example_of_two_inputs(export_dir, monkeypatch):
    """torch would take the inputs for one, without a word."""
    examples, real = [], torch.export.export

    def export(model, arguments, **options):
        inputs, past = arguments
        examples.extend([*inputs.values(), *past])
        return real(model, arguments, **options)

    monkeypatch.setattr(torch.export, "export", export)
    build.trace_export(loopexport.open_export(export_dir("llama")), "fp32")
    assert len(examples) > 3
    assert len({id(each) for each in examples}) == len(examples)


def test_graph_tells_nothing_of_where_it_was_made(graph):
    content = (graph("llama", steps=2) / "model.onnx").read_bytes()
    assert b"loop_steps" in content, "what else stands in it can be read, then"
    for trace in (b"site-packages", b'File "', b"pkg.torch", str(Path(loopexport.__file__).parent).encode()):
        assert trace not in content


def test_old_runtimes_that_hold_shared_weights_several_times_are_refused(export, monkeypatch):
    real = planning.version
    monkeypatch.setattr(planning, "version", lambda name: "1.22.1" if name == "onnxruntime" else real(name))
    assert "onnxruntime 1.22.1 loads a weight once for each place" in run("onnx", export).stderr


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
