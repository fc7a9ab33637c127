"""What must not leave stops a push, and only allow-listed files leave."""

from __future__ import annotations

import json
import os

import pytest

import loopexport
from loopexport.base import processor
from loopexport.export.directory import open_export
from loopexport.export.results import save_results
from loopexport.export.results_file import RESULTS
from loopexport.hub.allowlist import allowed_files
from support.commands import tree
from support.damage import flip_last_byte
from support.measured import LOSS, made_result
from support.multimodal import save_multimodal
from support.push import REPO, TOKEN, assert_refused, edit_manifest, pushed, remote_card, write_listed, writes


def make_local(root):
    edit_manifest(root, lambda values: values["base"].update(revision=None, name="base"))


def link(root, name, to):
    (root / name).symlink_to(to)


LEAKS = {
    ".env": (lambda root: (root / ".env").write_text("A=1"), ".env looks like a file with secrets"),
    "key": (lambda root: (root / "base" / "id_rsa").write_text("x"), "base/id_rsa looks like a file with secrets"),
    "file link": (lambda root: link(root, "LICENSE.md", "/etc/hostname"), "LICENSE.md is a symbolic link"),
    "folder link": (lambda root: link(root, "more", "/etc"), "more is a symbolic link"),
    "pickle": (lambda root: (root / "pytorch_model.bin").write_bytes(b"x"), "pytorch_model.bin may be a pickle"),
    "deep pickle": (lambda root: (root / "base" / "x.pt").write_bytes(b"x"), "base/x.pt may be a pickle"),
    "licence": (lambda root: (root / "LICENSE.pkl").write_bytes(b"x"), "LICENSE.pkl may be a pickle"),
    "code": (lambda root: (root / "modeling_evil.py").write_text("x"), "modeling_evil.py is code"),
    "listed code": (lambda root: write_listed(root, "evil.py", "x"), "evil.py is code"),
    "pipe": (lambda root: os.mkfifo(root / "pipe"), "pipe is neither a file nor a directory"),
    "token in config": (
        lambda root: write_listed(root, "generation_config.json", json.dumps({"token": TOKEN})),
        "generation_config.json contains something like a secret (hf_a1B...)",
    ),
    "token in card": (
        lambda root: (root / "README.md").write_text(f"export HF_TOKEN={TOKEN}"),
        "README.md contains something like a secret",
    ),
    "absolute path": (
        lambda root: (make_local(root), write_listed(root, "generation_config.json", '{"a": [{"b": "/home/me/x"}]}')),
        "generation_config.json contains the absolute path '/home/me/x'",
    ),
    "absolute Windows path": (
        lambda root: (make_local(root), write_listed(root, "generation_config.json", '{"a": "C:\\\\x"}')),
        "generation_config.json contains the absolute path",
    ),
    "path in the manifest": (
        lambda root: edit_manifest(root, lambda values: values["left_behind"].append("/home/me/x")),
        "loopexport.json contains the absolute path",
    ),
    "foreign processor code": (
        lambda root: write_listed(root, "processor_config.json", '{"auto_map": {"AutoProcessor": "a.B"}}'),
        "the auto_map of processor_config.json is not the installed LoopExport's",
    ),
    "foreign code of a part of the processor": (
        lambda root: write_listed(
            root, "processor_config.json", '{"a": [{"auto_map": {"AutoImageProcessor": "a.B"}}]}'
        ),
        "the auto_map of processor_config.json is not the installed LoopExport's",
    ),
    "foreign code in another file": (
        lambda root: write_listed(root, "generation_config.json", '{"a": {"auto_map": {"AutoConfig": "a.B"}}}'),
        "generation_config.json asks for foreign code (auto_map)",
    ),
    "foreign tokenizer code": (
        lambda root: write_listed(root, "tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["a.B", null]}}'),
        "the auto_map of tokenizer_config.json is not the installed LoopExport's",
    ),
    "template": (lambda root: flip_last_byte(root / "modeling_looped.py"), "modeling_looped.py has changed"),
    "forged template": (
        lambda root: write_listed(root, "modeling_looped.py", "raise SystemExit"),
        "modeling_looped.py is not the installed LoopExport's",
    ),
    "config": (
        lambda root: (root / "config.json").write_text(
            json.dumps({**json.loads((root / "config.json").read_text()), "auto_map": {"AutoConfig": "x--y.Z"}})
        ),
        "config.json differs from the base's in auto_map",
    ),
    "weights": (lambda root: flip_last_byte(min(root.glob("*.safetensors"))), "has changed (sha256)"),
    "short weights": (lambda root: os.truncate(min(root.glob("*.safetensors")), 999), "has changed (size)"),
    "weights elsewhere": (
        lambda root: edit_manifest(root, lambda values: values["weights"].update({"../x.safetensors": {"size": 1}})),
        "'../x.safetensors' is not a file name inside an export",
    ),
    "missing weights": (
        lambda root: (
            min(root.glob("*.safetensors")).unlink(),
            edit_manifest(root, lambda values: [record.pop("sha256") for record in values["weights"].values()]),
        ),
        "is missing",
    ),
}


@pytest.mark.parametrize("kind", LEAKS)
def test_what_must_not_leave_stops_the_push_and_is_named(hub, push, export, kind):
    spoil, says = LEAKS[kind]
    spoil(export)
    assert_refused(push(), says)
    assert writes(hub) == []
    assert REPO not in hub.repositories


def test_what_is_not_on_the_list_stays_behind(hub, push, export):
    for name in ("notes.txt", "extra.safetensors", "secret.json", "model.onnx", ".git/config", ".cache/x.bin"):
        (export / name).parent.mkdir(exist_ok=True)
        (export / name).write_text("mine")
    write_listed(export, "data.csv", "listed, but not allowed")
    (export / "USE_POLICY.md").write_text("be kind\n")
    before = tree(export)
    values = pushed(push("--json"))
    files = hub.repositories[REPO].files()
    stayed = {"notes.txt", "extra.safetensors", "secret.json", "model.onnx", ".git/config", ".cache/x.bin", "data.csv"}
    assert set(before) - set(files) == stayed
    assert files["USE_POLICY.md"] == b"be kind\n", "licence texts may be added by hand"
    assert {file["name"] for file in values["files"]} == set(files) - {".gitattributes"}
    assert tree(export) == before, "a push changes nothing here"


def test_measured_results_are_pushed_with_the_card_that_shows_them(hub, push, export):
    save_results(export, made_result(open_export(export).spec, LOSS))
    pushed(push("--json"))
    files = hub.repositories[REPO].files()
    assert files[RESULTS] == (export / RESULTS).read_bytes()
    assert "| openbookqa | acc | 500 | 0.4000 | 0.3500 | -0.0500 [-0.0800, -0.0200] | worse |" in remote_card(hub)
    assert "model-index:" in remote_card(hub)
    (export / RESULTS).write_text("{}")
    assert_refused(push(), f"{RESULTS} has changed")


def test_path_in_the_settings_of_a_result_stops_the_push(hub, push, export):
    save_results(export, made_result(open_export(export).spec, settings={"include_path": "/home/me/tasks"}))
    assert_refused(push(), "loop_results.json contains the absolute path '/home/me/tasks'; remove it and run")
    assert writes(hub) == []


def test_large_file_that_is_no_weights_is_sent_from_the_disk_and_not_twice(hub, push, export):
    write_listed(export, "tokenizer.json", "{}" + " " * (64 * 2**20))
    pushed(push("--json"))
    assert hub.repositories[REPO].files()["tokenizer.json"] == (export / "tokenizer.json").read_bytes()
    assert {file["how"] for file in pushed(push("--json"))["files"]} == {"there"}
    flip_last_byte(export / "tokenizer.json")
    assert_refused(push(), "tokenizer.json has changed")


def test_paths_that_the_base_has_published_itself_do_not_stop_the_push(push, export):
    write_listed(export, "generation_config.json", '{"_name_or_path": "/data/training/run"}')
    assert pushed(push("--json"))["commit"]


def test_processor_of_a_multimodal_export_leaves_with_the_original_that_asked_for_code(tmp_path):
    base = save_multimodal("llava", tmp_path / "base")
    for name in processor.NAMES:
        (base / name).write_text(json.dumps({"image_mean": [0.5], "auto_map": {"AutoProcessor": "own.Own"}}))
    out = loopexport.convert(base, tmp_path / "out", span=(2, 3), steps=2).root
    found = allowed_files(open_export(out))
    assert {each for name in processor.NAMES for each in (name, f"base/{name}")} <= set(found.small)
    assert found.staying == ()
    assert not any(b"auto_map" in found.small[name] for name in processor.NAMES)
