"""`push` of an adopted export: its own weights travel, and the card names the base that they came from."""

from __future__ import annotations

import json
import shutil

import pytest

import loopexport
from loopexport.export.card import read_metadata
from support.commands import sha256
from support.push import BASE, REPO, assert_refused, loopexport_command, pushed, remote_card, weights
from support.trained import save_trained


@pytest.fixture(scope="session")
def saved(converted, tmp_path_factory):
    """The export of the base on the Hub, trained and adopted."""
    root = save_trained(converted, tmp_path_factory.mktemp("adopted") / "tuned", max_shard_size="400KB")
    loopexport.adopt(root, base=converted)
    return root


@pytest.fixture
def export(saved, tmp_path):
    """It is only read; the name is what `push` of this folder pushes."""
    return saved


def test_trained_weights_are_uploaded_and_never_copied_from_the_base(hub, push, export):
    done = pushed(push("--json"))
    assert done["bytes_copied"] == 0
    files = hub.repositories[REPO].files()
    for name, digest in weights(export).items():
        assert files[name] == (export / name).read_bytes(), name
        assert {each["how"] for each in done["files"] if each["name"] == name} == {"uploaded"}
        assert json.loads(files["loopexport.json"])["weights"][name]["sha256"] == digest
    assert json.loads(files["loopexport.json"])["trained"] is True
    metadata = read_metadata(remote_card(hub))
    assert (metadata["base_model"], metadata["base_model_relation"]) == (BASE, "finetune")
    assert metadata["license"] == "apache-2.0"
    assert "Its weights were trained since" in remote_card(hub)
    assert all(each["how"] == "there" for each in pushed(push("--json"))["files"])


def test_missing_weights_cannot_come_from_the_base(hub, push, export, tmp_path):
    root = shutil.copytree(export, tmp_path / "copy")
    name = min(weights(root))
    (root / name).unlink()
    done = loopexport_command(hub, tmp_path / "home", "push", root, REPO)
    assert_refused(done, f"{name} is not here and the Hub cannot copy it (they were trained")


def test_files_of_a_trainer_stop_the_push(hub, export, tmp_path):
    root = shutil.copytree(export, tmp_path / "copy")
    (root / "training_args.bin").write_bytes(b"")
    assert_refused(loopexport_command(hub, tmp_path / "home", "push", root, REPO), "training_args.bin may be a pickle")
    assert sha256(root / "loopexport.json") == sha256(export / "loopexport.json")
