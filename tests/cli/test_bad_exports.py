"""Exports with a damaged manifest or an impossible config are refused in one line."""

from __future__ import annotations

import hashlib
import json

import pytest

import loopexport
from support.commands import run
from support.refusals import assert_refused


@pytest.mark.parametrize("command", [["inspect"], ["verify"], ["restore"]], ids=str)
def test_directory_that_is_no_export_is_refused(base, tmp_path, command):
    out = [tmp_path / "out"] if command == ["restore"] else []
    assert_refused(tmp_path, *command, base, *out, says="it has no loopexport.json; give a directory that `loopexport")
    assert_refused(tmp_path, *command, tmp_path / "none", *out, says="no directory")


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 99}', '{"format": 1}'])
def test_damaged_manifest_is_refused(base, tmp_path, text):
    root = loopexport.convert(str(base), tmp_path / "out", span=(1, 4), steps=3).root
    (root / "loopexport.json").write_text(text)
    assert_refused(tmp_path, "inspect", root, says="loopexport.json")


@pytest.fixture
def export(base, tmp_path):
    (base / "LICENSE").write_text("free")
    return loopexport.convert(str(base), tmp_path / "out", span=(1, 4), steps=3, weights="copy").root


BAD_RECORDS = [
    ("files", "../secret"),
    ("files", "base/../../secret"),
    ("files", "/etc/hostname"),
    ("files", "a\nb"),
    ("files", "a//b"),
    ("weights", "../secret"),
]


@pytest.mark.parametrize(("group", "name"), BAD_RECORDS)
def test_manifest_that_reaches_outside_is_refused(export, tmp_path, group, name):
    (tmp_path / "secret").write_text("theirs")
    manifest = json.loads((export / "loopexport.json").read_text())
    record = {"size": 6, "sha256": hashlib.sha256(b"theirs").hexdigest()}
    manifest[group][name] = record
    (export / "loopexport.json").write_text(json.dumps(manifest))
    for command in (["inspect"], ["verify", "--files-only"], ["restore"]):
        out = [tmp_path / "deep" / "back"] if command == ["restore"] else []
        assert_refused(tmp_path, *command[:1], export, *out, *command[1:], says="is not a file name inside an export")


@pytest.mark.parametrize(
    "changes",
    [
        {"loopexport": 7},
        {"onnx": {"model.onnx": {"size": 1, "steps": [2, "[x](https://evil)"]}}},
        {"base": {"name": 7}},
        {"base": {"name": "x", "revision": 7}},
        {"spec": {"span": [4, 1], "steps": 3}},
        {"weights": {"a": {"size": "big"}}},
        {"files": {"a": {"size": 1, "sha256": []}}},
        {"left_behind": [7]},
        {"weights_method": None},
        {"weights_method": "magic\x1b[2J"},
        {"loopexport": "1.0\n2"},
        {"loopexport": "<b>"},
        {"base": {"name": "x\n# y"}},
        {"base": {"name": "x\u202ey"}},
        {"base": {"name": "../x", "revision": "0" * 40}},
        {"base": {"name": "org/x](http://a.example", "revision": "0" * 40}},
        {"base": {"name": "org/x", "revision": "main`\n"}},
        {"onnx": {"model.onnx": {"size": 1, "dtype": "fp64"}}},
        {"onnx": {"model.onnx": {"size": 1, "attention": ["gqa"]}}},
    ],
    ids=str,
)
def test_manifest_with_values_of_other_types_is_refused(export, tmp_path, changes):
    manifest = json.loads((export / "loopexport.json").read_text())
    (export / "loopexport.json").write_text(json.dumps({**manifest, **changes}))
    assert_refused(tmp_path, "inspect", export, says="loopexport.json is damaged")


@pytest.mark.parametrize(
    ("group", "name"), [("files", "base/config.json"), ("files", "modeling_looped.py"), ("weights", None)]
)
def test_files_that_the_manifest_does_not_know_are_no_part_of_an_intact_export(export, tmp_path, group, name):
    manifest = json.loads((export / "loopexport.json").read_text())
    del manifest[group][name or next(iter(manifest[group]))]
    (export / "loopexport.json").write_text(json.dumps(manifest))
    verified = run("verify", export, "--files-only")
    assert (verified.exit_code, "not part of the export" in verified.stdout) == (1, True)
    assert_refused(tmp_path, "restore", export, tmp_path / "back", says="not part of the export")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"loop_span": [0, 10**12]}, "ends outside the model"),
        ({"loop_steps": 10**400}, "to 2147483647"),
        ({"loop_steps": [2, 3]}, "2 numbers of steps for 1 spans"),
        ({"loop_span": None}, "neither a span nor a path"),
        ({"loop_path": [[0, 6]]}, "a span and a path"),
        (
            {"loop_span": None, "loop_path": [[0, 9]], "loop_steps": 2},
            "the path visits layer 8, and the model has layers 0 to 5",
        ),
        ({"loop_span": None, "loop_path": [[0, 3], [2, 6]], "loop_steps": 4}, "so steps is 2, or 1"),
        ({"num_hidden_layers": "six"}, "is not a number of layers"),
        ({"model_type": 7}, "model_type 7"),
    ],
)
def test_export_whose_config_was_edited_to_an_impossible_one_is_refused(export, tmp_path, changes, says):
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps({**config, **changes}))
    for command in (["inspect"], ["verify", "--files-only"]):
        assert_refused(tmp_path, command[0], export, *command[1:], says=says)


@pytest.mark.parametrize("name", ["checkpoint", "a | b `c` <d> 模型", ""])
def test_local_base_may_have_any_printable_name(export, name):
    manifest = json.loads((export / "loopexport.json").read_text())
    (export / "loopexport.json").write_text(json.dumps({**manifest, "base": {"name": name, "revision": None}}))
    assert run("inspect", export).exit_code == 0


@pytest.mark.parametrize("config", [{}, {"model_type": 7}, {"model_type": "x\n"}, {"model_type": "llama"}], ids=str)
def test_export_without_weights_has_the_config_of_a_base_too(export, tmp_path, config):
    for path in export.glob("*.safetensors"):
        path.unlink()
    (export / "base" / "config.json").write_text(json.dumps(config))
    assert_refused(tmp_path, "inspect", export, says="")


def test_types_of_config_values_are_told_apart(export):
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps({**config, "vocab_size": float(config["vocab_size"])}))
    verified = run("verify", export, "--files-only")
    assert (verified.exit_code, "differs from the base's in vocab_size" in verified.stdout) == (1, True)
