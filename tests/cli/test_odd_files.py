"""Files of a base that are none, cannot be read or have odd names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

import pytest

import loopexport
from support.commands import SPEC, run, tree
from support.refusals import AS_ANOTHER_USER, INDEX, circle


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def folder(path):
    path.unlink(missing_ok=True)
    path.mkdir()


def endless(path):
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("put", [pipe, folder, endless, circle])
@pytest.mark.parametrize("name", ["config.json", INDEX, "model-00001-of-00002.safetensors"])
def test_what_is_no_file_in_the_place_of_one_is_refused(base, tmp_path, put, name):
    put(base / name)
    result = run("convert", base, tmp_path / "out", *SPEC)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert any(says in result.stderr for says in ("is not a", "Too many levels", "no weights in")), result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("put", [pipe, folder, endless, circle])
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "README.md", "model.safetensors", "base", "loopexport.json", "LICENSE"]
)
def test_what_is_no_file_stays_behind_where_none_is_needed(base, tmp_path, put, name):
    put(base / name)
    assert run("convert", base, tmp_path / "out", *SPEC).exit_code == 0
    assert (name in tree(tmp_path / "out")) == (name in ("README.md", "loopexport.json"))


def test_files_of_any_name_stay_behind_and_are_listed_in_one_line(base, tmp_path):
    names = [b"x\ny", b"\xff", b"\x1b[2J", b"LICENSE.\xff", b"x" * 255, b"base", b"loopexport.json", b"Config.json"]
    for name in names:
        (base / os.fsdecode(name)).write_text("{}")
    planned = run("convert", base, tmp_path / "out", *SPEC, "--dry-run")
    assert planned.stdout.count("\n") == run("convert", base, tmp_path / "out", *SPEC).stdout.count("\n")
    assert "x\\ny" in planned.stdout
    left = json.loads((tmp_path / "out" / "loopexport.json").read_text())["left_behind"]
    assert left == sorted(map(os.fsdecode, names))


def test_folders_nested_ever_so_deep_stay_behind(base, tmp_path, monkeypatch):
    monkeypatch.chdir(base)
    for _ in range(1500):
        os.mkdir("d")
        os.chdir("d")
    os.chdir(tmp_path)
    try:
        assert run("convert", base, tmp_path / "out", *SPEC).exit_code == 0
    finally:  # deeper than pytest's own cleaning up can go
        subprocess.run(["rm", "-rf", base / "d"], check=True)


@pytest.mark.parametrize("name", [b"x\ny", b"\xff", b"\x1b[2J", b"~nobody-here", b" "], ids=str)
def test_base_and_output_may_have_any_name(base, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    num_lines = run("convert", base, "plain", *SPEC, "--dry-run").stdout.count("\n")
    base = base.rename(tmp_path / os.fsdecode(name))
    (tmp_path / "out").mkdir()
    result = run("convert", base, os.path.join("out", os.fsdecode(name)), *SPEC)
    assert (result.exit_code, result.stdout.count("\n")) == (0, num_lines), result.stderr
    assert run("restore", tmp_path / "out" / os.fsdecode(name), tmp_path / "back").exit_code == 0
    assert tree(tmp_path / "back") == tree(base)


@pytest.mark.parametrize("name", ["tokenizer.json", "README.md", "model-00001-of-00002.safetensors"])
def test_unreadable_file_of_the_base_is_named_by_the_dry_run_too(base, tmp_path, name):
    (base / name).touch()
    (base / name).chmod(0o000)
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == os.geteuid() and path.is_relative_to(tempfile.gettempdir()) and path.name != "tmp":
            path.chmod(0o755)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours").chmod(0o777)
    for options in (["--dry-run"], []):
        command = ["convert", str(base), str(tmp_path / "ours" / "out"), *SPEC, *options]
        done = subprocess.run([sys.executable, "-c", AS_ANOTHER_USER, *command], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (1, f"Error: cannot read {base / name}: Permission denied\n")
    assert not list((tmp_path / "ours").iterdir())


def test_source_that_turns_unreadable_is_not_taken_for_the_output(tmp_path):
    from loopexport.files.digests import file_xxh3
    from loopexport.files.placement import place

    for read in (lambda: place(tmp_path / "none", tmp_path / "out", "copy"), lambda: file_xxh3(tmp_path / "none")):
        with pytest.raises(loopexport.errors.CheckpointError, match=r"cannot read .*none: No such file"):
            read()
    assert not (tmp_path / "out").exists()
