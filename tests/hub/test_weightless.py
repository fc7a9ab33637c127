"""Exports that were converted without weights."""

from __future__ import annotations

import json

import pytest

import loopexport
from support.hub_double import HubDouble
from support.push import (
    BASE,
    HAS_COPY,
    REPO,
    assert_refused,
    bytes_received,
    copies,
    load,
    loopexport_command,
    pushed,
    weights,
)
from support.tiny import SPAN


@copies
def test_conversion_without_weights_downloads_none_and_push_completes_it(hub, weightless, converted, tmp_path):
    assert not any(weights(root) for root in (weightless, tmp_path / "home"))
    total = sum((converted / name).stat().st_size for name in weights(converted))
    assert sum(count for name, count in hub.sent.items() if name.endswith(".safetensors")) < total
    done = loopexport_command(hub, tmp_path / "home", "push", weightless, REPO, "--json")
    assert pushed(done)["bytes_copied"] == total
    assert bytes_received(hub) == 0
    whole = HubDouble()
    whole.add(BASE, converted)  # only to have the files of the whole export in the same form
    expected, files = whole.repositories[BASE].files(), hub.repositories[REPO].files()
    whole.shutdown()
    for name in set(expected) - {"README.md", "loopexport.json"}:
        assert files[name] == expected[name], name
    assert "no weights" not in files["README.md"].decode()


def test_directory_without_weights_says_so_everywhere(hub, weightless, tmp_path):
    from click.testing import CliRunner

    from loopexport.cli.commands import main

    manifest = json.loads((weightless / "loopexport.json").read_text())
    assert manifest["weights_method"] == "none"
    assert "**There are no weights in this directory**" in (weightless / "README.md").read_text()
    inspected = CliRunner().invoke(main, ["inspect", str(weightless)])
    assert inspected.exit_code == 0
    assert "Weights  NOT HERE, 3 files" in inspected.stdout
    assert CliRunner().invoke(main, ["inspect", str(weightless), "--json"]).exit_code == 0
    verified = CliRunner().invoke(main, ["verify", str(weightless)])
    assert verified.exit_code == 1
    assert "is not here: converted with --weights none" in verified.stdout
    restored = CliRunner().invoke(main, ["restore", str(weightless), str(tmp_path / "again")])
    assert (restored.exit_code, restored.stderr.count("\n")) == (1, 1)
    assert "is not here" in restored.stderr


@pytest.mark.parametrize("option", [["--no-server-copy"], []])
def test_weights_that_are_nowhere_to_be_had_stop_the_push(hub, weightless, tmp_path, option):
    if not option:
        hub.fail("POST", "/lfs-files/duplicate", status=403, message="not here")
    done = loopexport_command(hub, tmp_path / "home", "push", weightless, REPO, *option)
    assert_refused(done, "is not here and the Hub cannot copy it")
    assert "convert the base again with its weights" in done.stderr
    if REPO in hub.repositories:
        assert list(hub.repositories[REPO].files()) == [".gitattributes"]


def test_local_base_cannot_be_converted_without_weights(base, tmp_path):
    with pytest.raises(loopexport.LoopExportError, match="needs a base on the Hub"):
        loopexport.plan_convert(str(base), tmp_path / "out", span=SPAN, steps=3, weights="none")


@pytest.mark.skipif(HAS_COPY, reason="this huggingface_hub can")
def test_client_that_cannot_copy_uploads_and_says_so(hub, push, weightless, tmp_path):
    done = push("--json")
    assert pushed(done)["bytes_copied"] == 0
    assert "this huggingface_hub cannot copy between repositories; install version 2" in done.stderr
    done = loopexport_command(hub, tmp_path / "home", "push", weightless, REPO + "2")
    assert_refused(done, "is not here and the Hub cannot copy it (this huggingface_hub cannot copy")


@copies
def test_round_trip_computes_the_same_logits_bitwise(hub, weightless, converted, tmp_path, monkeypatch):
    """Converted without weights, pushed without a byte of them, loaded from the Hub where LoopExport is not."""
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in this process: sums are in the same order
    done = loopexport_command(hub, tmp_path / "home", "push", weightless, REPO, "--json")
    commit = pushed(done)["commit"]
    (tmp_path / "elsewhere").mkdir()
    ours = load(hub, tmp_path / "elsewhere", REPO, commit, tmp_path / "ours.pt")
    theirs = AutoModelForCausalLM.from_pretrained(converted, trust_remote_code=True)
    assert ours["class"] == type(theirs).__name__ == "LoopedLlamaForCausalLM"
    assert torch.equal(ours["logits"], theirs(torch.arange(3, 40)[None]).logits)
    assert bytes_received(hub) == 0
