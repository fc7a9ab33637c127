"""Links in a stranger's base or export: no command copies what lies outside, and nothing hangs."""

from __future__ import annotations

import os
import socket

import pytest

import loopexport
from support.commands import SPEC, run, tree
from support.refusals import INDEX, assert_refused

READ = ["LICENSE", "README.md", "chat_template.jinja", "tokenizer.json", "config.json", INDEX, "generation_config.json"]


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "home" / "credentials"
    path.parent.mkdir()
    path.write_text('{"key": "correct-horse"}')
    return path


def put_link(path, target):
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize("name", [*READ, "additional_chat_templates/x.jinja"])
def test_link_out_of_a_base_is_refused_by_name(base, secret, tmp_path, name):
    put_link(base / name, secret)
    for options in (["--dry-run"], []):
        says = f"{name} is a symbolic link to {secret}, which is not a file of {base}; replace it"
        assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, *options, says=says)


def test_environment_is_not_exported(base, tmp_path):
    (base / "LICENSE").symlink_to("/proc/self/environ")
    assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, says="LICENSE is a symbolic link to /proc")


@pytest.mark.parametrize("name", ["notes.txt", "vocab", "base/config.json", ".env", "model.bin"])
def test_link_that_no_export_copies_stays_behind(base, secret, tmp_path, name):
    put_link(base / name, secret)
    assert run("convert", base, tmp_path / "out", *SPEC).exit_code == 0
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and b"horse" in path.read_bytes()]


def test_folder_that_is_a_link_stays_behind(base, secret, tmp_path):
    (secret.parent / "x.jinja").write_text("theirs")
    (base / "additional_chat_templates").symlink_to(secret.parent)
    assert run("convert", base, tmp_path / "out", *SPEC).exit_code == 0
    assert not (tmp_path / "out" / "additional_chat_templates").exists()


def test_links_inside_a_base_and_linked_weights_are_followed(base, tmp_path):
    for path in list(base.glob("*.safetensors")):
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    (base / "COPYING").write_text("free")
    (base / "LICENSE").symlink_to("COPYING")
    (tmp_path / "alias").symlink_to(base)
    assert run("convert", tmp_path / "alias", tmp_path / "out", *SPEC, "--weights", "copy").exit_code == 0
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]
    assert tree(tmp_path / "out").items() >= {name: tree(base)[name] for name in ("LICENSE", INDEX)}.items()


def test_weights_linked_to_something_else_are_refused(base, secret, tmp_path):
    put_link(min(base.glob("*.safetensors")), secret)
    assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, says="is not a whole safetensors file")


def test_names_that_differ_in_case_only_are_refused(base, tmp_path):
    (base / "LICENSE").write_text("free")
    (base / "License").write_text("not free")
    assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, says="both LICENSE and License, one name on")


@pytest.fixture
def export(base, tmp_path):
    (base / "LICENSE").write_text("free")
    return loopexport.convert(str(base), tmp_path / "out", span=(1, 4), steps=3, weights="copy").root


COMMANDS = {
    "inspect": ["inspect", "EXPORT"],
    "verify": ["verify", "EXPORT", "--files-only"],
    "restore": ["restore", "EXPORT", "BACK"],
    "onnx": ["onnx", "EXPORT", "--out", "BACK", "--dry-run"],
    "push": ["push", "EXPORT", "me/name", "--token", "none"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "name", ["LICENSE", "README.md", "config.json", "loopexport.json", "base/config.json", "generation_config.json"]
)
def test_link_out_of_an_export_is_refused_by_every_command(export, secret, tmp_path, command, name):
    moved = secret.parent / "moved"
    (export / name).rename(moved) if (export / name).exists() else moved.write_text("{}")
    (export / name).symlink_to(moved)
    places = {"EXPORT": export, "BACK": tmp_path / "back"}
    arguments = [places.get(each, each) for each in COMMANDS[command]]
    assert_refused(tmp_path, *arguments, says=f"{name} is a symbolic link to {moved}, which is not")


def test_folder_of_originals_that_is_a_link_is_refused(export, tmp_path):
    (export / "base").rename(tmp_path / "moved")
    (export / "base").symlink_to(tmp_path / "moved")
    assert_refused(tmp_path, "inspect", export, says="base/config.json is a symbolic link to")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "name", ["LICENSE", "tokenizer.json", "adapter_config.json", "base/vocab.txt", "loopexport.json"]
)
def test_pipe_in_an_export_is_an_error_and_does_not_block(export, tmp_path, command, name):
    (export / name).unlink(missing_ok=True)
    os.mkfifo(export / name)
    says = "is not a file" if name == "loopexport.json" else "is neither a file nor a directory; remove it from"
    assert_refused_quickly(tmp_path, export, command, says)


def test_socket_and_link_to_a_device_are_refused_too(export, tmp_path, monkeypatch):
    (export / "additional_chat_templates").mkdir()
    (export / "additional_chat_templates" / "x.jinja").symlink_to("/dev/zero")
    assert_refused_quickly(tmp_path, export, "verify", "x.jinja is neither a file nor a directory")
    (export / "additional_chat_templates" / "x.jinja").unlink()
    monkeypatch.chdir(export)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("base/s")
    assert_refused_quickly(tmp_path, export, "verify", "s is neither a file nor a directory")


def test_links_to_nowhere_that_nobody_reads_stop_only_verify(export):
    (export / "nowhere").symlink_to("none")
    (export / "circle").symlink_to("circle")
    assert run("inspect", export).exit_code == 0
    assert "replace them with files, or remove them" in run("verify", export, "--files-only").stdout


def assert_refused_quickly(tmp_path, export, command, says):
    """`assert_refused` reads all files, which would block."""
    done = run(*[{"EXPORT": export, "BACK": tmp_path / "back"}.get(each, each) for each in COMMANDS[command]])
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1), done.output
    assert says in done.stderr
    assert not (tmp_path / "back").exists()
