"""Exports in int4 and int8: equal to torch on the dequantised weights, stored once, and what that costs is told."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

import loopexport
from loopexport.export.quantisation import Quantisation
from loopexport.onnx import OnnxModel, build, export_onnx, plan_onnx
from loopexport.onnx.check import comparison
from loopexport.onnx.check.comparison import AS_RUN, load_torch
from loopexport.onnx.check.cost import PROSE
from loopexport.onnx.check.dequantised import in_full_precision
from loopexport.onnx.quantise.sensitive import is_sensitive
from support.commands import checks, run
from support.damage import edit_config
from support.made_onnx import refused
from support.push import edit_manifest
from support.tiny import NUM_LAYERS

# One family for each way in which linear layers differ: plain, transposed with biases, latents, experts, a tied head.
CLASSES = {
    "llama": {"symmetric": True},
    "gpt2": {"quantise_head": True},
    "deepseek_v3": {},
    "qwen3_moe": {"mixed": True},
    "gemma2": {"quantise_head": True},
}


@pytest.fixture
def export_of(export_dir, traced, tmp_path, monkeypatch):
    """`export_of(family)`: a copy of an export, whose trace is the session's."""

    def make(family):
        monkeypatch.setattr(build, "trace_export", lambda export, *kind: traced(family, *kind))
        return shutil.copytree(export_dir(family), tmp_path / family)

    return make


@pytest.fixture(scope="module")
def quantised(made, tmp_path_factory):
    """A copy of `made` with `model_q4.onnx`, K = 3, and its outcome."""
    root = shutil.copytree(made, tmp_path_factory.mktemp("quantised") / "export")
    text = root.with_name("mine.txt")
    text.write_text(PROSE.read_text()[:1500])
    return root, export_onnx(root, dtype="int4", quantise_head=True, text=text)


@pytest.fixture
def export(quantised, tmp_path):
    """A copy of it that a test may change."""
    return shutil.copytree(quantised[0], tmp_path / "export")


def products(path):
    """For each operator of a graph, the names of the weights that it multiplies by."""
    found = {}
    for node in ir.load(path).graph.all_nodes():
        if node.op_type in ("MatMul", "Gemm", "MatMulNBits") and node.inputs[1].is_initializer():
            found.setdefault(node.op_type, set()).add(node.inputs[1].name)
    return found


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(name, marks=pytest.mark.matrix) for name in CLASSES if name != "llama")]
)
def test_graph_equals_torch_on_the_dequantised_weights(export_of, family):
    root, counts = export_of(family), []
    plan = plan_onnx(root, dtype="int4", **CLASSES[family])
    outcome = plan.apply(progress=counts.append)
    (found,) = outcome.checks.values()
    assert all(each.passed for each in found), found
    assert sum(counts) == plan.data_bytes
    exact = [each.difference for each in found if each.name != AS_RUN]
    (as_run,) = [each.difference for each in found if each.name == AS_RUN]
    assert max(exact) < 1e-5 < as_run
    assert "no tokenizer in" in outcome.not_measured
    by = products(root / "model_q4.onnx")
    kept = by.get("Gemm", set()) | by.get("MatMul", set())
    routers = {name for name in kept if "mlp.gate" in name}
    latents = {name for name in kept if "kv_b_proj" in name}  # 24 inputs are less than a block
    assert kept - routers - latents <= {"lm_head.weight"}
    assert bool(routers) == (family in ("deepseek_v3", "qwen3_moe"))
    assert any("experts" in line for line in plan.warnings) == bool(routers)


def test_one_set_of_codes_serves_every_k(export):
    before = (export / "model_q4.onnx_data").stat()
    export_onnx(export, dtype="int4", quantise_head=True, steps=(1, 6), verify=False)
    assert (export / "model_q4.onnx_data").stat().st_mtime_ns == before.st_mtime_ns
    assert products(export / "model_k6_q4.onnx") == products(export / "model_k1_q4.onnx")
    assert checks(export, "--files-only", "--full")[1] == 0
    tokens = OnnxModel(export, "model_k6_q4.onnx").generate(np.array([[5, 6]]), max_new_tokens=2)
    assert tokens.shape == (1, 2)


@pytest.mark.parametrize(
    "options", [{"block_size": 64}, {"symmetric": True}, {"mixed": True}, {"quantise_head": False}]
)
def test_other_choices_do_not_change_the_weights_under_a_graph(export, options):
    chosen = {"quantise_head": True, **options}
    with pytest.raises(loopexport.LoopExportError, match=r"model_q4.onnx in .* write it again too: --steps 2,3"):
        plan_onnx(export, dtype="int4", steps=[2], **chosen)
    with pytest.raises(
        loopexport.LoopExportError, match=r"delete it, and write it again afterwards with `.* --dtype int4"
    ):
        plan_onnx(export, dtype="int4", attention="gqa", **chosen)
    export_onnx(export, dtype="int4", verify=False, **chosen)  # replaces the graph that reads the file
    assert checks(export, "--files-only", "--full")[1] == 0


def test_data_in_the_layout_of_an_earlier_release_is_replaced_with_all_its_graphs(export, one_trace):
    export_onnx(export, dtype="fp16", steps=(2, 3), verify=False)
    data = export / "model_fp16.onnx_data"
    content = data.read_bytes()
    weights = products(export / "model_fp16.onnx")["MatMul"]
    assert len(weights) == 7 * NUM_LAYERS + 1, "every product reads its weight directly"
    assert data.write_bytes(content[::-1]) == len(content)
    digest = build.file_xxh3(data)

    def as_earlier(values):
        values["onnx"][data.name].update(xxh3_128=digest)
        del values["onnx"][data.name]["layout"]

    edit_manifest(export, as_earlier)
    assert "write it again too: --steps 2,3" in refused("onnx", export, "--dtype", "fp16", "--dry-run")
    export_onnx(export, dtype="fp16", steps=(2, 3), verify=False)
    assert data.read_bytes() == content


def damage(root, change):
    """Change the data file of a graph, by a function of its arrays by name."""
    path = root / "model_q4.onnx"
    file = np.memmap(root / "model_q4.onnx_data", np.uint8, "r+")
    arrays = {
        name: file[value.const_value.offset : value.const_value.offset + value.const_value.length]
        for name, value in ir.load(path).graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    change(arrays)
    file.flush()


def swap(one, other):
    one[:], other[:] = other.copy(), one.copy()


def flip(array, mask):
    array[:1] ^= mask


def part(arrays, layer, name):
    return arrays[f"model.layers.{layer}.mlp.down_proj.weight.{name}"]


DAMAGE = {
    "two scales": lambda arrays: swap(part(arrays, 2, "scales")[:4], part(arrays, 2, "scales")[8:12]),
    "a code": lambda arrays: flip(part(arrays, 2, "codes"), 0x80),
    "a zero point": lambda arrays: flip(part(arrays, 2, "zero_points"), 0x01),
    "scales of two layers": lambda arrays: swap(part(arrays, 1, "scales"), part(arrays, 2, "scales")),
}


def test_damaged_weights_do_not_pass(export):
    spec = loopexport.open_export(export).spec
    data = export / "model_q4.onnx_data"
    intact, theirs = data.read_bytes(), load_torch(export, spec.steps)
    for kind, change in DAMAGE.items():
        damage(export, change)
        found = comparison.compare(OnnxModel(export, "model_q4.onnx"), theirs, spec, "fp32", "portable")
        failed = [each.name for each in found if not each.passed]
        assert "prefill, decode and a chunk equal torch" in failed, kind
        data.write_bytes(intact)
    found = comparison.compare(OnnxModel(export, "model_q4.onnx"), theirs, spec, "fp32", "portable")
    assert all(each.passed for each in found), "the damage is undone, and so are the changes of the model in torch"


def test_rounded_activations_that_go_astray_do_not_pass(export, monkeypatch):
    """The graph as it runs is compared too, not only its copy in full precision."""
    ours, spec = OnnxModel(export, "model_q4.onnx"), loopexport.open_export(export).spec
    exact, forward = in_full_precision(ours), ours.forward
    monkeypatch.setattr(comparison, "in_full_precision", lambda model: exact)

    def astray(*inputs, **options):
        logits, cache = forward(*inputs, **options)
        return -logits, cache

    ours.forward = astray
    found = comparison.compare(ours, load_torch(export, spec.steps), spec, "fp32", "portable")
    assert [each.name for each in found if not each.passed] == [AS_RUN]


def test_cost_is_told_everywhere(quantised):
    root, outcome = quantised
    (cost,) = outcome.costs.values()
    assert cost.tokens > 300
    assert cost.base.nats > 0
    assert cost.loop.nats > 0
    assert 0 < cost.loop.agreement < 1
    record = json.loads((root / "loopexport.json").read_text())["onnx"]["model_q4.onnx"]
    assert record["cost"]["loop"]["nats"] == cost.loop.nats
    assert record["quantised"]["head"] is True
    assert record["difference"] < 1e-5, "of the exact graph: activations in 8 bits are judged apart"
    card = (root / "README.md").read_text()
    assert f"- `model_q4.onnx`, on {cost.tokens:,} tokens of `mine.txt`: KL {cost.loop.nats:.3g} nats a token" in card
    assert "| `model_q4.onnx` | 3 | fp32, weights in int4 in blocks of 32 with zero points, the head in int8 |" in card
    assert 'model_file_name: "model", dtype: "q4"' in card
    assert json.loads((root / "genai_config.json").read_text())["model"]["decoder"]["filename"] == "model_q4.onnx"


def test_text_of_the_users_own(export, tmp_path):
    text = tmp_path / "mi\nne.txt"
    text.write_text("it is what it is " * 9)
    outcome = export_onnx(export, dtype="int8", steps=[1], text=text)
    (cost,) = outcome.costs.values()
    assert cost.text == "mi\ufffdne.txt", "a name that does not print would damage the manifest"
    assert cost.base == cost.loop
    assert cost.base.nats < 0.1, "int8 is nearly free"
    assert "cannot read" in refused("onnx", export, "--dtype", "int4", "--text", tmp_path / "none.txt")


def test_verify_and_stale_graphs_know_quantised_graphs(export):
    outcome, status = checks(export)
    assert status == 0, outcome
    assert outcome["model_q4.onnx computes what torch does"]["difference"] < 1e-5
    edit_config(export, loop_anchor=0.5)
    assert "--dtype int4 --quantise-head` again" in refused("run", export, "it is", "--file", "model_q4.onnx")


@pytest.mark.parametrize("option", [["--compute", "fp16"], ["--block-size", "64"], ["--symmetric"], ["--mixed"]])
def test_options_of_quantising_alone_are_refused_without_it(export, option):
    assert "is for --dtype int4 and int8" in refused("onnx", export, "--dtype", "fp16", *option, "--dry-run")
    assert "8 everywhere" in refused("onnx", export, "--dtype", "int8", "--mixed", "--dry-run")
    assert "must be one of 16, 32" in refused("onnx", export, "--dtype", "int8", "--block-size", "8", "--dry-run")


@pytest.mark.parametrize("name", ["model_q4.onnx", "model_q4.onnx_data"])
def test_command_that_writes_a_damaged_file_again_is_named(export, name):
    (export / name).unlink()
    detail = checks(export, "--files-only")[0]["ONNX files are as written"]["detail"]
    command = re.search(rf"{name} is missing.*; run `loopexport (.*)` to export it again", detail)[1]
    assert run(*command.split(), "--no-verify").exit_code == 0
    assert checks(export, "--files-only", "--full")[1] == 0


def test_a_block_that_no_matrix_fills_is_refused(export):
    says = "no matrix of the base has 32 outputs and a whole block of 256 inputs, so nothing would be quantised"
    assert says in refused("onnx", export, "--dtype", "int8", "--block-size", "256", "--dry-run")


def test_plan_says_how_weights_are_stored(export):
    result = run("onnx", export, "--dtype", "int4", "--compute", "fp16", "--steps", "4", "--dry-run")
    assert "model_k4_q4f16.onnx (K = 4)" in result.stdout
    assert "Quantise int4 in blocks of 32 with zero points" in result.stdout


def test_manifest_with_another_quantisation_is_damaged(export):
    for field, value in (("quantised", {"bits": 5}), ("cost", {"text": "a", "tokens": 1, "base": {}, "loop": {}})):
        root = shutil.copytree(export, export.with_name(f"broken-{field}"))
        edit_manifest(
            root, lambda values, field=field, value=value: values["onnx"]["model_q4.onnx"].update({field: value})
        )
        assert "is damaged" in refused("inspect", root)


def test_mixed_layers_are_those_of_the_model_builder():
    mixed = replace(Quantisation(4), mixed=True)
    chosen = [index for index in range(16) if is_sensitive(f"model.layers.{index}.mlp.down_proj.weight", 16, mixed)]
    assert chosen == [0, 1, 4, 7, 10, 13, 14, 15]
    assert not is_sensitive("model.layers.0.mlp.up_proj.weight", 16, mixed)
    assert not is_sensitive("model.layers.0.mlp.down_proj.weight", 16, Quantisation(4))
