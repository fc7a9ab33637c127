"""Weights: copied on the Hub where that is possible, otherwise uploaded, and no byte twice."""

from __future__ import annotations

import json

import pytest

import loopexport
from support.commands import sha256
from support.damage import flip_last_byte
from support.push import (
    BASE,
    REPO,
    assert_refused,
    bytes_received,
    copies,
    edit_manifest,
    loopexport_command,
    pushed,
    remote_card,
    weights,
)
from support.tiny import SPAN


def test_no_server_copy_uploads_all_weights_once(hub, push, export):
    done = push("--json", "--no-server-copy")
    values = pushed(done)
    assert values["bytes_copied"] == 0
    assert "Note: weights are uploaded, not copied by the Hub: --no-server-copy" in done.stderr
    assert hub.received == {digest: (export / name).stat().st_size for name, digest in weights(export).items()}


def test_linked_weights_of_which_no_digest_is_known_are_told(hub, tiny_base, tmp_path):
    for method, count in (("hardlink", 1), ("copy", 0)):
        root = loopexport.convert(str(tiny_base()), tmp_path / method, span=SPAN, steps=3, weights=method).root
        done = loopexport_command(hub, tmp_path / "home", "push", root, REPO, "--dry-run")
        assert done.stderr.count("model.safetensors is a link to the base's file and has no recorded digest") == count


def test_large_files_are_uploaded_in_the_parts_that_the_hub_asks_for(hub, push, export):
    hub.part_bytes = 100_000
    pushed(push("--json", "--no-server-copy"))
    assert len(hub.parts) > 6
    files = hub.repositories[REPO].files()
    assert {name: files[name] for name in weights(export)} == {n: (export / n).read_bytes() for n in weights(export)}


@copies
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"status": 403, "message": "storage regions differ"}, "storage regions differ"),
        ({"status": 422, "message": "no xet"}, "no xet"),
    ],
)
def test_refused_copy_falls_back_to_upload_and_says_so(hub, push, export, fault, says):
    hub.fail("POST", "/lfs-files/duplicate", **fault)
    done = push("--json")
    values = pushed(done)
    assert f"Note: the Hub does not copy from {BASE} ({says}): uploading instead" in done.stderr
    assert (
        values["bytes_uploaded"]
        > bytes_received(hub)
        == sum((export / name).stat().st_size for name in weights(export))
    )
    assert len(hub.repositories[REPO].commits) == 2


@copies
def test_copies_that_fail_one_by_one_fall_back_to_upload(hub, push, export):
    hub.failed_copies = "another storage region"
    done = push("--json")
    assert pushed(done)["bytes_copied"] == 0
    assert "another storage region" in done.stderr
    assert set(hub.received) == set(weights(export).values())


@copies
def test_trouble_while_copying_is_no_reason_to_upload_gigabytes(hub, push):
    hub.fail("POST", "/lfs-files/duplicate", status=503, times=99)
    assert_refused(push(), "the Hub has an error of its own (503")
    assert bytes_received(hub) == 0


@copies
def test_base_whose_storage_cannot_be_copied_from_means_upload(hub, push, export):
    hub.has_xet = False
    done = push("--json")
    assert pushed(done)["bytes_copied"] == 0
    assert f"{BASE} at" in done.stderr
    assert not any("duplicate" in path for _, path in hub.asked)


@copies
def test_base_that_cannot_be_read_any_more_means_upload(hub, push):
    del hub.repositories[BASE]
    done = push("--json")
    assert pushed(done)["bytes_copied"] == 0
    assert f"Note: weights are uploaded, not copied by the Hub: there is no {BASE}" in done.stderr


@copies
def test_other_bytes_than_the_bases_are_never_copied(hub, push, export):
    """The manifest is forged to fit a shard that is not the base's."""
    name = min(weights(export))
    flip_last_byte(export / name)
    edit_manifest(export, lambda values: values["weights"][name].update(sha256=sha256(export / name)))
    values = pushed(push("--json"))
    assert {file["name"]: file["how"] for file in values["files"]}[name] == "uploaded"
    assert hub.repositories[REPO].files()[name] == (export / name).read_bytes()
    assert list(hub.received) == [sha256(export / name)]


def test_weights_that_the_target_has_are_not_sent_again_after_the_loop_changed(hub, push, export):
    pushed(push("--json", "--no-server-copy"))
    received = dict(hub.received)
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps({**config, "loop_steps": 5}))
    values = pushed(push("--json", "--no-server-copy"))
    changed = {file["name"] for file in values["files"] if file["how"] != "there"}
    assert changed == {"config.json", "README.md", "loopexport.json"}
    assert hub.received == received
    assert json.loads(hub.repositories[REPO].files()["config.json"])["loop_steps"] == 5
    assert "| steps K | 5 |" in remote_card(hub), "a card that nobody has edited tells of the loop that it goes with"


def test_local_base_is_uploaded_from_its_export(hub, base, tmp_path):
    out = loopexport.convert(str(base), tmp_path / "out", span=SPAN, steps=3, weights="copy").root
    done = loopexport_command(hub, tmp_path / "home", "push", out, REPO, "--json")
    assert pushed(done)["bytes_copied"] == 0
    assert "the base base is a local directory" in done.stderr
