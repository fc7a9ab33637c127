"""`verify` lists the whole directory: what a runtime would load fails, everything else is named."""

from __future__ import annotations

import shutil

import pytest

import loopexport
from loopexport.export.foreign_files import is_loaded
from loopexport.export.integrity import check_files
from support.commands import sha256
from support.push import edit_manifest

KNOWS = "the manifest knows every file"


@pytest.fixture
def export(export_dir, tmp_path):
    """A copy of an export that a test may damage."""
    return shutil.copytree(export_dir("llama"), tmp_path / "export")


def knows(root):
    """The check of the directory's names."""
    return next(check for check in check_files(loopexport.open_export(root)) if check.name == KNOWS)


def write(root, name, content="x"):
    """Write a file, and its folders."""
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(content)


LOADED = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "Adapter_Config.JSON",
    "model-00002-of-00002.safetensors",
    "CONSOLIDATED.Safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "original/consolidated.00.pth",
    "model.pt",
    "model.ckpt",
    "weights-q4.gguf",
    "tf_model.h5",
    "flax_model.msgpack",
    "modeling_other.py",
    "custom_generate/generate.py",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tools.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "merges.txt",
    "vocab.bpe",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "hf_quant_config.json",
    "params.json",
    "genai_config.json",
    "onnx/model.onnx",
    "model_fp32.onnx_data",
    "model.onnx.data",
    "base/added_tokens.json",
)
OTHERS = ("LICENSE", "notes.txt", "pictures/cat.png", "eval results.json", "log", ".gitattributes", "LICENSES/why.md")


@pytest.mark.parametrize("name", LOADED)
def test_foreign_file_that_a_runtime_would_load_fails(export, name):
    edit_manifest(export, lambda values: values["files"].pop("generation_config.json"))
    (export / "generation_config.json").unlink()
    write(export, name)
    assert is_loaded(name)
    check = knows(export)
    assert check.passed is False
    assert check.detail == f"not part of the export, but a runtime may load it: {name}; move it elsewhere"


def test_other_foreign_files_are_named_and_pass(export):
    for name in OTHERS:
        write(export, name)
    for name in (".git/x.py", ".cache/huggingface/x.bin", "more/__pycache__/x.pyc"):
        write(export, name)
    check = knows(export)
    assert check.passed
    assert check.detail.endswith(f"not part of the export: {', '.join(sorted(OTHERS))}")


def test_many_foreign_files_are_counted(export):
    for number in range(11):
        write(export, f"note {number:02}.txt")
    assert "note 07.txt and 3 more" in knows(export).detail


def test_a_record_in_the_manifest_does_not_make_an_adapter_part_of_the_export(export):
    write(export, "adapter_config.json", "{}")
    record = {"size": 2, "sha256": sha256(export / "adapter_config.json")}
    edit_manifest(export, lambda values: values["files"].update({"adapter_config.json": record}))
    assert "a runtime may load it: adapter_config.json;" in knows(export).detail


@pytest.mark.parametrize("kind", ["file", "folder", "dangling"])
def test_link_that_the_manifest_does_not_have_fails(export, tmp_path, kind):
    target = {"file": export / "README.md", "folder": tmp_path, "dangling": tmp_path / "nothing"}[kind]
    (export / "notes").symlink_to(target)
    check = knows(export)
    assert check.passed is False
    assert "may point anywhere: notes; replace them" in check.detail


def test_links_of_the_hubs_cache_are_files(export_dir, tmp_path):
    """In a snapshot every file is a link to a blob, `.gitattributes` too, which the Hub adds."""
    root = shutil.copytree(export_dir("llama"), tmp_path / "snapshots" / "0123")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    write(root, ".gitattributes")
    for number, path in enumerate(sorted(each for each in root.rglob("*") if each.is_file())):
        path.rename(blobs / str(number))
        up = "/".join([".."] * len(path.relative_to(tmp_path).parts[:-1]))
        path.symlink_to(f"{up}/blobs/{number}")
    check = knows(root)
    assert check.passed is True
    assert ".gitattributes" in check.detail


def test_an_adapter_stops_the_model_checks(export):
    """transformers would load it into base and export alike, so that no comparison of the two could see it."""
    write(export, "adapter_config.json", "{}")
    names = {check.name: check.passed for check in loopexport.verify(export)}
    assert names[KNOWS] is False
    assert "steps 1 is bitwise the base model" not in names
