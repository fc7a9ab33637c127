"""Bases named by a Hub id: resolved once to a commit, from a warm cache when offline, and refused in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from loopexport.export.card import read_metadata
from support.checkpoints import write_sparse_checkpoint
from support.commands import SPEC, sha256
from support.hub_double import HubDouble
from support.push import loopexport_command


@pytest.fixture
def hub(tmp_path):
    root = write_sparse_checkpoint(tmp_path / "served", shards=2, shard_bytes=400_000, layers_per_shard=3)
    (root / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (root / "tokenizer.json").write_text("{}")
    (root / "pytorch_model.bin").write_bytes(b"pickle")
    (root / "modeling_evil.py").write_text("raise SystemExit('ran')")
    server = HubDouble()
    server.sha = server.add("org/model", root)
    server.root = root
    server.fail(".*", "/org/gated", status=403, code="GatedRepo", times=99)
    server.fail(".*", "/org/broken", status=451, times=99)  # the client tries 500 and more again, for half a minute
    yield server
    server.shutdown()


@pytest.fixture
def convert(hub, tmp_path):
    """Run `loopexport convert` against the double; with other variables, in a process of its own."""

    def run(model, *options, **environment):
        if not environment:
            command = ["convert", model, tmp_path / "out", *SPEC, *options]
            return loopexport_command(hub, tmp_path / "home", *command, token=None)
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", **environment}
        settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "5"}
        command = [sys.executable, "-m", "loopexport", "convert", model, str(tmp_path / "out"), *SPEC, *options]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings})

    return run


def test_hub_model_is_resolved_to_a_commit_that_is_recorded(hub, convert, tmp_path):
    done = convert("org/model")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out" / "loopexport.json").read_text())
    assert manifest["base"] == {"name": "org/model", "revision": hub.sha}
    assert read_metadata((tmp_path / "out" / "README.md").read_text())["base_model"] == "org/model"
    for path in hub.root.glob("*.safetensors"):
        assert sha256(tmp_path / "out" / path.name) == sha256(path)


def test_pickles_and_foreign_code_are_not_even_downloaded(hub, convert, tmp_path):
    assert convert("org/model").returncode == 0
    assert not {"pytorch_model.bin", "modeling_evil.py"} & set(hub.sent)
    manifest = json.loads((tmp_path / "out" / "loopexport.json").read_text())
    assert manifest["left_behind"] == ["modeling_evil.py", "pytorch_model.bin"]


def test_dry_run_reads_the_headers_of_the_weights_only(hub, convert, tmp_path):
    done = convert("org/model", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    size = sum(path.stat().st_size for path in hub.root.glob("*.safetensors"))
    assert values["weights"]["bytes"] == size
    assert values["cost"]["multiplier"] == 2.0
    assert sum(count for name, count in hub.sent.items() if name.endswith(".safetensors")) < size
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_warm_cache_is_enough_offline(hub, convert, tmp_path):
    assert convert("org/model", "--weights", "hardlink").returncode == 0
    hub.shutdown()
    done = convert("org/model", "--overwrite", "--weights", "hardlink", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out" / "loopexport.json").read_text())
    assert manifest["base"] == {"name": "org/model", "revision": hub.sha}
    for name, record in manifest["weights"].items():  # the cache names its blobs by their sha256
        assert record["sha256"] == sha256(hub.root / name)


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        ("org/gated", [], "org/gated is gated: accept its terms on its page"),
        ("org/missing", [], "no directory org/missing, and no model of that name on the Hub that you can see"),
        ("org/broken", [], "no directory org/broken, and asking the Hub for a model of that name failed ("),
        ("org/model", ["--revision", "nope"], "org/model has no revision 'nope'"),
    ],
)
def test_refusals_are_one_line_that_says_what_to_do(convert, tmp_path, model, options, says):
    done = convert(model, *options)
    assert (done.returncode, done.stdout) == (1, "")
    assert [line for line in done.stderr.splitlines() if line.startswith("Error: ") and says in line], done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_cold_cache_offline_is_explained(convert):
    done = convert("org/model", HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "Error: no directory org/model, and no model of that name in the Hub's cache" in done.stderr
    assert "unset HF_HUB_OFFLINE to ask the Hub" in done.stderr


def test_unreachable_hub_is_explained_at_once(convert):
    started = time.monotonic()
    done = convert("org/model", HF_ENDPOINT="http://127.0.0.1:9")
    assert time.monotonic() - started < 15, "the client's own retries take 23 s"
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("Error: no directory org/model, and asking the Hub for a model of that")
    assert "or set HF_HUB_OFFLINE=1 to use the cache" in done.stderr


def test_hub_that_breaks_after_the_first_file_is_explained(hub, convert):
    hub.fail("GET", r"/api/models/org/model/revision/[0-9a-f]{40}", status=451)
    done = convert("org/model")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "asking the Hub for a model of that name failed" in done.stderr
    assert "451" in done.stderr


def test_repository_without_config_is_refused(hub, convert):
    (hub.root / "config.json").unlink()
    hub.add("org/model", hub.root)
    done = convert("org/model")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        1,
        "Error: org/model has no config.json; is it a transformers model?",
    )


def test_adapter_on_the_hub_is_refused_before_any_weights_travel(hub, convert):
    (hub.root / "adapter_config.json").write_text('{"base_model_name_or_path": "org/other"}')
    hub.add("org/both", hub.root)
    done = convert("org/both")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "org/both holds an adapter for org/other (adapter_config.json)" in done.stderr
    assert not [name for name in hub.sent if name.endswith(".safetensors")]
    for path in hub.root.glob("*model*"):
        path.unlink()
    (hub.root / "config.json").unlink()
    hub.add("org/alone", hub.root)
    assert "org/alone holds only an adapter for org/other; load it with peft" in convert("org/alone").stderr
