"""Outputs that cannot be written, and trouble while writing: nothing is written, nothing is lost."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import loopexport
from support.commands import SPEC, run, tree
from support.refusals import AS_ANOTHER_USER, assert_refused, circle


def test_output_that_exists_is_refused(base, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    for options in ([], ["--overwrite"]):
        assert_refused(tmp_path, "convert", base, tmp_path / "full", *SPEC, *options, says="is not a LoopExport export")


def test_output_that_is_a_file_is_refused(base, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert_refused(tmp_path, "convert", base, tmp_path / "file", *SPEC, says="exists and is not a directory")


def test_output_that_is_a_link_is_refused_and_its_directory_named(base, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "fresh").mkdir()
    for target, says in {
        "fresh": f"is a link; name the directory that it points to, {tmp_path / 'fresh'}, or remove the link",
        "file": "is a link; it points to no directory; choose another name or remove the link",
        "nowhere": "is a link; it points to no directory; choose another name or remove the link",
    }.items():
        (tmp_path / f"to-{target}").symlink_to(target)
        assert_refused(tmp_path, "convert", base, tmp_path / f"to-{target}", *SPEC, "--overwrite", says=says)


def test_output_inside_or_around_the_model_is_refused(base, tmp_path):
    (tmp_path / "link").symlink_to(base)
    for out, says in (
        (base / "looped", "lies inside the model"),
        (base / "deep" / "er", "lies inside the model"),
        (tmp_path / "link" / "looped", "lies inside the model"),
        (base, "is the model itself"),
        (tmp_path, "contains the model"),
    ):
        assert_refused(tmp_path, "convert", base, out, *SPEC, "--overwrite", says=says)


def test_output_below_a_file_is_refused(base, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert_refused(tmp_path, "convert", base, tmp_path / "file" / "out", *SPEC, says="cannot write into")


def test_read_only_target_is_refused(base, tmp_path):
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == os.geteuid() and path.is_relative_to(tempfile.gettempdir()) and path.name != "tmp":
            path.chmod(0o755)  # the other user has to come this far
    target = tmp_path / "read-only"
    target.mkdir(mode=0o555)
    command = [sys.executable, "-c", AS_ANOTHER_USER, "convert", str(base), str(target / "out"), *SPEC]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"Error: cannot write into {target}" in done.stderr
    assert not list(target.iterdir())


def test_unreadable_model_is_refused(base, tmp_path):
    base.chmod(0o000)
    command = [sys.executable, "-c", AS_ANOTHER_USER, "convert", str(base / "inner"), str(tmp_path / "out"), *SPEC]
    done = subprocess.run(command, capture_output=True, text=True)
    base.chmod(0o755)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "Permission denied" in done.stderr


def test_too_little_space_is_seen_before_copying(base, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    says = "has 1,000 bytes free where"
    assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, "--weights", "copy", says=says)


def test_disk_that_fills_up_while_copying_leaves_nothing(base, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, "--weights", "copy", says="no space left for")


def test_file_that_cannot_be_written_is_told_by_its_place_in_the_output(base, tmp_path, monkeypatch):
    real = Path.write_bytes

    def refuse(path, content):
        if path.name == "modeling_looped.py":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, content)

    monkeypatch.setattr(Path, "write_bytes", refuse)
    says = f"cannot write {tmp_path / 'out'}: Permission denied ({tmp_path / 'out' / 'modeling_looped.py'})"
    assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, says=says)
    monkeypatch.chdir(tmp_path)
    says = f"cannot write out: Permission denied ({Path('out') / 'modeling_looped.py'})"
    assert_refused(tmp_path, "convert", base, "out", *SPEC, says=says)


def test_interrupt_leaves_nothing_and_exits_with_130(base, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    before = tree(tmp_path)
    monkeypatch.setattr(os, "copy_file_range", interrupt)
    result = run("convert", base, tmp_path / "out", *SPEC, "--weights", "copy")
    assert (result.exit_code, tree(tmp_path)) == (130, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_hardlink_across_file_systems_is_refused(base, tmp_path, monkeypatch):
    def other_device(*arguments):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_device)
    says = "use --weights auto or copy"
    assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, "--weights", "hardlink", says=says)


def test_output_that_appears_meanwhile_is_left_alone(base, tmp_path, monkeypatch):
    import loopexport.export.conversion as module

    real = module.place_weights

    def slow(*arguments):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "other.txt").write_text("somebody else's")
        return real(*arguments)

    monkeypatch.setattr(module, "place_weights", slow)
    result = run("convert", base, tmp_path / "out", *SPEC)
    assert result.exit_code == 1
    assert tree(tmp_path / "out").keys() == {"other.txt"}


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("x" * 201, "must have at most 200 bytes"),
        ("x/" * 3000, "File name too long"),
        ("circle", "is a link; it points to no directory"),
        ("circle/x", "cannot write into"),
        ("nowhere/x", "cannot write into"),
    ],
    ids=lambda value: value[:20],
)
def test_outputs_that_cannot_be_are_refused_by_the_dry_run_too(base, tmp_path, monkeypatch, out, says):
    monkeypatch.chdir(tmp_path)
    circle(tmp_path / "circle")
    (tmp_path / "nowhere").symlink_to("none")
    for options in (["--dry-run"], []):
        assert_refused(tmp_path, "convert", base, out, *SPEC, *options, says=says)


def test_output_may_be_the_empty_directory_where_one_stands(base, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run("convert", base, ".", *SPEC).exit_code == 0
    assert loopexport.open_export(tmp_path / "here").spec.steps == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "here"]


@pytest.mark.parametrize("text", ["{}", "[]", "thesis", '{"format": 1}'])
def test_overwrite_takes_no_other_directory_with_a_file_of_the_manifests_name(base, tmp_path, text):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "loopexport.json").write_text(text)
    says = "is not a LoopExport export"
    assert_refused(tmp_path, "convert", base, tmp_path / "mine", *SPEC, "--overwrite", says=says)
