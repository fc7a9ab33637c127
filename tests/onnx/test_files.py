"""Files of graphs are placed all or none; foreign code of an export is not run."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from loopexport.onnx import OnnxModel, build
from support.commands import checks, run, tree
from support.damage import EXPLODES, edit_config
from support.made_onnx import refused


def foreign_tokenizer(root):
    path = root / "tokenizer_config.json"
    entry = {"auto_map": {"AutoTokenizer": [None, "tokenization_own.Own"]}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **entry}))
    (root / "tokenization_own.py").write_text(EXPLODES)


def custom_generate(root):
    (root / "custom_generate").mkdir()
    (root / "custom_generate" / "generate.py").write_text(EXPLODES)


def foreign_auto_map(root):
    entries = json.loads((root / "config.json").read_text())["auto_map"]
    edit_config(root, auto_map={**entries, "AutoModelForCausalLM": "own.Model", "AutoTokenizer": [None, "own.Tokens"]})
    (root / "own.py").write_text(EXPLODES)


FOREIGN = {
    "modeling_looped.py": lambda root: (root / "modeling_looped.py").write_text(EXPLODES),
    "configuration_looped.py": lambda root: (root / "configuration_looped.py").write_text(EXPLODES),
    "custom_generate/generate.py": custom_generate,
    "the auto_map of config.json": foreign_auto_map,
    "the auto_map of tokenizer_config.json": foreign_tokenizer,
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_code_is_refused_by_onnx_and_not_run_by_run(export, name):
    FOREIGN[name](export)
    assert f"{name} in {export} is not the installed LoopExport's" in refused("onnx", export, "--dry-run")
    assert run("run", export, "it is", "--max-new-tokens", "2").exit_code == 0


def test_custom_generate_is_not_run_by_verify(export):
    custom_generate(export)
    outcome, status = checks(export)
    assert status == 1
    assert "may load it: custom_generate/generate.py" in outcome["the manifest knows every file"]["detail"]
    assert "steps 1 is bitwise the base model" not in outcome
    assert "is code that LoopExport did not write" in refused("push", export, "me/name", "--token", "none")


def genai_graph(root):
    return json.loads((root / "genai_config.json").read_text())["model"]["decoder"]["filename"]


def test_genai_config_names_the_graph_of_the_exports_own_k(export, one_trace):
    assert genai_graph(export) == "model.onnx"
    assert run("onnx", export, "--no-verify", "--steps", "2").exit_code == 0
    assert genai_graph(export) == "model.onnx"
    assert checks(export, "--files-only")[1] == 0
    (export / "model.onnx").unlink()
    (export / "genai_config.json").unlink()
    result = run("onnx", export, "--no-verify", "--steps", "2")
    assert "genai_config.json names model_k2.onnx, K = 2: there is no graph of the export's own K, 3" in result.stderr
    assert genai_graph(export) == "model_k2.onnx"
    assert run("onnx", export, "--no-verify").exit_code == 0
    assert genai_graph(export) == "model.onnx"


@pytest.mark.parametrize(
    ("step", "failure"),
    [
        ("save_graph", RuntimeError),
        ("_graph_record", KeyboardInterrupt),
        ("write_genai_config", RuntimeError),
        ("_record_files", KeyboardInterrupt),
    ],
)
def test_run_that_is_stopped_leaves_the_earlier_one(export, one_trace, monkeypatch, step, failure):
    real = getattr(build, step)

    def stop(*arguments):
        real(*arguments)
        raise failure

    monkeypatch.setattr(build, step, stop)
    edit_config(export, loop_anchor=0.5)
    before = tree(export)
    result = run("onnx", export, "--no-verify", "--steps", "3,4", "--dtype", "fp16")
    assert result.exit_code == (130 if failure is KeyboardInterrupt else 1)
    assert tree(export) == before


@pytest.mark.parametrize("options", [[], ["--dtype", "fp16"]], ids=str)
def test_links_in_a_strangers_export_are_not_written_through(export, one_trace, tmp_path, options):
    (tmp_path / "mine").write_text("mine")
    names = [
        "README.md",
        "loopexport.json",
        "model.onnx",
        "model_fp16.onnx",
        "model_fp16.onnx_data",
        "genai_config.json",
    ]
    for name in names:
        (export / f".{name}.partial").symlink_to(tmp_path / "mine")
        (export / f".{name}.replaced").symlink_to(tmp_path / "mine")
    (export / "genai_config.json").unlink()
    (export / "genai_config.json").symlink_to(tmp_path / "mine")
    result = run("onnx", export, "--no-verify", *options)
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "mine").read_text() == "mine"
    assert not [path for path in export.iterdir() if path.is_symlink() or path.name.startswith(".")]


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "generation_config.json"])
def test_run_does_not_wait_for_a_pipe(export, name):
    (export / name).unlink(missing_ok=True)
    os.mkfifo(export / name)
    assert f"{name} is neither a file nor a directory" in refused("run", export, "it is")


@pytest.mark.parametrize("kind", ["inside", "a file", "above"])
def test_out_that_cannot_be_is_told(export, kind, tmp_path):
    (tmp_path / "file").write_text("mine")
    out = {"inside": export / "deep" / "out", "a file": tmp_path / "file", "above": tmp_path}[kind]
    assert "the output" in refused("onnx", export, "--out", out, "--dry-run")


def test_out_that_is_the_export_itself_means_in_place(export, monkeypatch):
    monkeypatch.chdir(export)
    for out in (".", export, "../export"):
        result = run("onnx", ".", "--out", out, "--dry-run", "--json")
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["directory"] == "."


def test_weights_that_are_links_are_refused_before_any_work(export, one_trace, tmp_path):
    (export / "model.safetensors").rename(tmp_path / "blob")
    (export / "model.safetensors").symlink_to(tmp_path / "blob")
    assert "is a link out of it, which ONNX Runtime refuses" in refused("onnx", export, "--dry-run")
    assert "its weights are links out of" in refused("run", export, "it is")
    for options in (["--dtype", "fp16"], ["--out", tmp_path / "copy"]):  # the advice holds
        result = run("onnx", export, *options, "--no-verify")
        assert result.exit_code == 0, result.stderr
    assert OnnxModel(export, "model_fp16.onnx").generate(np.array([[5]]), max_new_tokens=2).shape == (1, 2)
    assert OnnxModel(tmp_path / "copy").generate(np.array([[5]]), max_new_tokens=2).shape == (1, 2)


def test_plan_tells_what_each_k_makes_of_the_loop(export):
    lines = run("onnx", export, "--steps", "1,2,8", "--dry-run").stdout
    assert "K = 1: the base\n" in lines
    assert "K = 2: euler, s = 0.5, 2 evaluations of the span" in lines
    assert "K = 8: euler, s = 0.125, 8 evaluations of the span" in lines
    assert "0.333" not in lines
