"""The command `loopexport onnx`, and `verify` on what it wrote."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

import loopexport
import loopexport.onnx
from loopexport.onnx import OnnxModel, build
from loopexport.onnx.check.comparison import TOLERANCES
from support.commands import checks, run, sha256, tree
from support.damage import edit_config, flip_last_byte
from support.push import edit_manifest
from support.tiny import SPAN


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
    assert outcome["ONNX files are as written"]["detail"].startswith("model_fp16.onnx_data has changed (xxh3_128)")


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


def test_edited_graph_that_is_recorded_as_genuine_is_caught(export, one_trace):
    assert run("onnx", export, "--no-verify").exit_code == 0
    path = export / "model.onnx"
    graph = onnx.load(path, load_external_data=False)
    next(node for node in graph.graph.node if node.op_type == "Sub").op_type = "Add"
    onnx.save(graph, path)
    digest = {"size": path.stat().st_size, "sha256": sha256(path)}
    edit_manifest(export, lambda values: values["onnx"][path.name].update(digest))
    outcome, _ = checks(export)
    assert [name for name in outcome if outcome[name]["passed"] is False] == ["model.onnx computes what torch does"]


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
    assert outcome["ONNX files are as written"]["detail"].startswith(says)


@pytest.mark.matrix
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
