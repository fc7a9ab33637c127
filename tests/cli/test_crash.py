"""A conversion that is killed leaves no half-made output, never touches its source, and can simply be run again."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from support.checkpoints import write_sparse_checkpoint
from support.commands import SPEC, run, tree

SHARD_BYTES = 150_000_000  # a few tenths of a second to copy


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_sparse_checkpoint(tmp_path_factory.mktemp("crash") / "base", shards=2, shard_bytes=SHARD_BYTES)


def start(base, out, *options):
    command = [sys.executable, "-m", "loopexport", "convert", base, out, *SPEC, "--weights", "copy", *options]
    return subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def assert_complete(out):
    result = run("verify", out, "--files-only", "--full")
    assert result.exit_code == 0, result.stdout


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def wait_for_partial(directory):
    """Wait until the copy is under way, so that a kill cannot come too early."""
    while not list(directory.glob(".out.*.partial/*.safetensors")):
        time.sleep(0.005)


@pytest.mark.parametrize("moment", [0.03, 0.15, 0.27, 0.43])
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT], ids=["kill", "interrupt"])
def test_killed_at_any_moment_leaves_all_or_nothing(base, tmp_path, moment, kill):
    source = {path: path.stat().st_mtime_ns for path in base.iterdir()}
    process = start(base, tmp_path / "out")
    wait_for_partial(tmp_path)
    time.sleep(moment)
    process.send_signal(kill)
    process.wait()
    if (tmp_path / "out").exists():
        assert_complete(tmp_path / "out")
    elif kill == signal.SIGINT:
        assert names(tmp_path) == []
    else:
        assert run("convert", base, tmp_path / "out", *SPEC, "--weights", "hardlink").exit_code == 0
        assert_complete(tmp_path / "out")
        assert names(tmp_path) == ["out"]  # the leftovers are gone
    assert {path: path.stat().st_mtime_ns for path in base.iterdir()} == source


def test_killed_while_overwriting_keeps_the_older_export(base, tmp_path):
    assert run("convert", base, tmp_path / "out", *SPEC, "--weights", "hardlink").exit_code == 0
    before = tree(tmp_path / "out")
    process = start(base, tmp_path / "out", "--overwrite")
    wait_for_partial(tmp_path)
    process.kill()
    process.wait()
    assert tree(tmp_path / "out") == before


def test_killed_between_the_two_renames_is_put_right_by_the_next_run(base, tmp_path):
    assert run("convert", base, tmp_path / "out", *SPEC, "--weights", "hardlink").exit_code == 0
    (tmp_path / "out").rename(tmp_path / ".out.abc.replaced")
    refused = run("convert", base, tmp_path / "out", "--span", "9:9", "--steps", 2)
    assert refused.exit_code == 1
    assert run("convert", base, tmp_path / "out", *SPEC, "--weights", "hardlink", "--overwrite").exit_code == 0
    assert names(tmp_path) == ["out"]


def test_a_run_beside_another_does_not_remove_its_work(base, tmp_path):
    first = start(base, tmp_path / "out")
    wait_for_partial(tmp_path)
    second = run("convert", base, tmp_path / "out", *SPEC, "--weights", "hardlink")
    assert second.exit_code == 0
    assert first.wait() == 1  # the output is there by now, and not its own
    assert_complete(tmp_path / "out")
    assert names(tmp_path) == ["out"]
