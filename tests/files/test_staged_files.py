"""Files of a directory are replaced all or none, never through a link, and killed runs leave nothing for good."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest

from loopexport.errors import OutputError
from loopexport.files.staged_directory import staged_directory
from loopexport.files.staged_files import StagedFiles, staged_files
from support.commands import texts

NAMES = re.compile(r"last|old|new|half|model(_k\d+)?\.onnx|README\.md")


def replace(root, *names, text=b"new"):
    with staged_files(root, NAMES, "last") as files:
        for name in names:
            files.write(name, text)
        files.keep()


@pytest.fixture
def victim(tmp_path):
    """A file of the user's, outside the directory that is written."""
    path = tmp_path / "home" / "profile"
    path.parent.mkdir()
    path.write_text("mine")
    return path


@pytest.fixture
def root(tmp_path):
    path = tmp_path / "root"
    path.mkdir()
    return path


@pytest.mark.parametrize("can_link", [True, False])
def test_staged_files_replace_all_or_none(monkeypatch, root, can_link):
    def refuse(*arguments, **options):
        raise OSError("no links here")

    if not can_link:
        monkeypatch.setattr("os.link", refuse)
    (root / "old").write_text("old")
    files = StagedFiles(root)
    for name in ("old", "new"):
        files.write(name, b"new")
    files.partial("half").write_text("ha")
    files.end()
    assert texts(root) == {"old": "old"}
    replace(root, "old", "new")
    assert texts(root) == {"old": "new", "new": "new"}


def test_staging_that_is_stopped_between_two_steps_leaves_no_second_name(monkeypatch, root):
    def stop(*arguments):
        raise KeyboardInterrupt

    (root / "old").write_text("old")
    files = StagedFiles(root)
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", stop)
        with pytest.raises(KeyboardInterrupt):
            files.write("old", b"new")
    files.end()
    assert texts(root) == {"old": "old"}


@pytest.mark.parametrize("name", ["README.md", ".README.md.partial", ".README.md.replaced", ".README.md.a.partial"])
@pytest.mark.parametrize("kept", [True, False])
def test_link_under_any_name_is_not_written_through(root, victim, name, kept):
    (root / name).symlink_to(victim)
    with staged_files(root, NAMES, "last") as files:
        files.write("README.md", b"theirs")
        if kept:
            files.keep()
    assert texts(victim.parent) == {"profile": "mine"}
    if kept:
        assert texts(root) == {"README.md": "theirs"}
        assert not (root / "README.md").is_symlink()
    else:
        assert [path.name for path in root.iterdir()] == (["README.md"] if name == "README.md" else [])


def test_dangling_link_is_put_back_after_a_failure(root):
    (root / "README.md").symlink_to("nowhere")
    with staged_files(root, NAMES, "last") as files:
        files.write("README.md", b"new")
    assert os.readlink(root / "README.md") == "nowhere"


@pytest.mark.parametrize("name", ["README.md", ".README.md.replaced"])
def test_directory_in_the_place_of_a_file_is_an_error_and_stays(root, name):
    (root / name).mkdir()
    with pytest.raises(OutputError, match=r"cannot write .*README.md: .*directory"):
        replace(root, "README.md")
    assert [path.name for path in root.iterdir()] == [name]


LEFT = {
    ".README.md.partial": "of an earlier version",
    ".model.onnx.x1_y2z3w.partial": "half",
    ".model_k12.onnx.abcdefgh.partial": "half",
    ".README.md.replaced": "older",
}


def test_next_run_removes_what_a_killed_run_left_and_nothing_else(root):
    others = {".notes.partial": "mine", ".git.partial": "mine", "x.partial": "mine", "README.md": "old"}
    for name, text in {**LEFT, **others}.items():
        (root / name).write_text(text)
    (root / ".model.onnx.partial").mkdir()
    (root / ".model.onnx.partial" / "thesis").write_text("mine")
    with staged_files(root, NAMES, "last"):
        pass
    assert {path.name for path in root.iterdir()} == {*others, ".model.onnx.partial"}
    assert texts(root / ".model.onnx.partial") == {"thesis": "mine"}


def kill_within(monkeypatch, root, step):
    """Replace two files and the last one by a run that is killed in its `step`-th renaming, linking or removing."""
    calls = count(1)

    def or_die(real):
        def call(*arguments, **options):
            if next(calls) == step:
                raise KilledError
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for owner, name in ((Path, "replace"), (Path, "unlink"), (Path, "rename"), (os, "link")):
            patch.setattr(owner, name, or_die(getattr(owner, name)))
        files = StagedFiles(root)
        for name in ("old", "new", "last"):
            files.write(name, b"new")
        files.keep()
        files.end()


class KilledError(BaseException):
    """Stands for SIGKILL: nothing runs afterwards."""


OLDER = {"old": "older", "last": "older"}
NEWER = dict.fromkeys(("old", "new", "last"), "new")


@pytest.mark.parametrize("can_link", [True, False])
def test_next_run_finds_all_or_nothing_of_a_killed_one(monkeypatch, tmp_path, can_link):
    def refuse(*arguments, **options):
        raise OSError("no links here")

    if not can_link:
        monkeypatch.setattr("os.link", refuse)
    outcomes = []
    for step in range(1, 100):
        root = tmp_path / str(step)
        root.mkdir()
        for name, text in OLDER.items():
            (root / name).write_text(text)
        try:
            kill_within(monkeypatch, root, step)
        except KilledError:
            with staged_files(root, NAMES, "last"):
                pass
            found = texts(root)
            if found != NEWER:  # a new file beside the older ones is whole, and nothing knows it
                assert found == {**OLDER, **({"new": "new"} if "new" in found else {})}, step
            outcomes.append(found == NEWER)
        else:
            break
    assert outcomes == sorted(outcomes)
    assert {*outcomes} == {False, True}


HOLD = """
import re, sys, time
from pathlib import Path
from loopexport.files.staged_files import staged_files
with staged_files(Path(sys.argv[1]), re.compile("half"), "last") as files:
    files.partial("half").write_text("ha")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_run_beside_another_is_refused_until_that_one_is_killed(root):
    process = subprocess.Popen([sys.executable, "-c", HOLD, root], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    with pytest.raises(OutputError, match="another run is writing into"):
        replace(root, "new")
    assert len(list(root.iterdir())) == 1, "the work of the other run stays"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    replace(root, "new")
    assert texts(root) == {"new": "new"}


def test_staged_directory_leaves_links_of_its_names_alone(tmp_path, victim):
    for name in (".out.abc.partial", ".out.abc.replaced"):
        (tmp_path / name).symlink_to(victim.parent)
    (tmp_path / ".out.pipe.partial").write_text("no directory")
    with staged_directory(tmp_path / "out") as partial:
        (partial / "file").write_text("new")
    assert texts(tmp_path / "out") == {"file": "new"}
    assert texts(victim.parent) == {"profile": "mine"}
    assert (tmp_path / ".out.abc.replaced").is_symlink()
