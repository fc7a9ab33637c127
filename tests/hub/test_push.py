"""`push`: one commit holds the whole export, and pushing again sends nothing."""

from __future__ import annotations

import json

import pytest

import loopexport
from loopexport import templates
from support.commands import sha256
from support.hub_requests import EXPIRED_TOKEN, OWNER_TOKEN
from support.push import (
    REPO,
    assert_refused,
    bytes_received,
    copies,
    edit_manifest,
    loopexport_process,
    pushed,
    weights,
    writes,
)


@copies
def test_one_commit_holds_the_whole_export_and_no_weight_byte_travelled(hub, push, export):
    done = pushed(push("--json"))
    repository = hub.repositories[REPO]
    assert list(done) == ["url", "commit", "files", "bytes_uploaded", "bytes_copied"]
    assert (done["url"], done["commit"]) == (f"{hub.url}/{REPO}", repository.refs["main"])
    assert len(repository.commits) == 2, "the empty first one, and ours"
    assert bytes_received(hub) == 0
    sizes = {path.relative_to(export).as_posix(): path.stat().st_size for path in export.rglob("*") if path.is_file()}
    weight_bytes = sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
    assert done["bytes_copied"] == weight_bytes
    assert done["bytes_uploaded"] == sum(file["size"] for file in done["files"] if file["how"] == "uploaded")
    files = repository.files()
    assert set(files) == {*sizes, ".gitattributes"}
    for name in set(sizes) - {"README.md", "loopexport.json"}:
        assert files[name] == (export / name).read_bytes(), name
    assert not repository.private


def test_pushed_card_names_its_own_repository_and_the_manifest_records_it(hub, push, export, tmp_path):
    pushed(push("--json"))
    files = hub.repositories[REPO].files()
    assert f'path = "{REPO}"' in files["README.md"].decode()
    again = tmp_path / "again"
    for name, content in files.items():
        (again / name).parent.mkdir(parents=True, exist_ok=True)
        (again / name).write_bytes(content)
    manifest = json.loads(files["loopexport.json"])
    assert manifest["files"]["README.md"]["sha256"] == sha256(again / "README.md")
    assert all(check.passed for check in loopexport.verify(again, full=True))


def test_pushing_again_sends_nothing_and_makes_no_commit(hub, push):
    first = pushed(push("--json"))
    hub.asked.clear()
    second = pushed(push("--json"))
    assert second["commit"] == first["commit"]
    assert {file["how"] for file in second["files"]} == {"there"}
    assert writes(hub) == []


@copies
def test_dry_run_tells_the_way_of_every_file_and_sends_nothing(hub, push, export):
    (export / "notes.txt").write_text("mine")
    done = pushed(push("--dry-run", "--json"))
    assert (done["commit"], REPO in hub.repositories, writes(hub)) == (None, False, [])
    assert {file["how"] for file in done["files"] if file["name"] in weights(export)} == {"copied"}
    text = push("--dry-run").stdout
    assert "copied on Hub" in text
    assert "uploaded        config.json" in text
    assert "stays here      notes.txt" in text
    assert "Dry run: nothing was sent." in text
    assert "notes.txt" not in {file["name"] for file in done["files"]}


def test_private_branch_message_and_bare_name_reach_the_hub(hub, push):
    done = pushed(push("--json", "--private", "--revision", "k3", "--commit-message", "Loop it", to="Looped"))
    repository = hub.repositories[REPO]
    assert repository.private
    assert repository.commits[done["commit"]].title == "Loop it"
    assert repository.refs["k3"] == done["commit"] != repository.refs["main"]
    assert list(repository.files("main")) == [".gitattributes"]
    assert done["url"] == f"{hub.url}/{REPO}/tree/k3"


def test_new_branch_of_what_main_holds_already_is_made(hub, push):
    pushed(push("--json"))
    done = pushed(push("--json", "--revision", "k3"))
    assert hub.repositories[REPO].refs.keys() == {"main", "k3"}
    assert hub.repositories[REPO].files("k3").keys() == hub.repositories[REPO].files("main").keys()
    assert {file["how"] for file in done["files"]} == {"there"}
    assert pushed(push("--json", "--revision", "k3"))["commit"] == done["commit"]


def test_pull_request_leaves_main_alone_and_needs_no_write_permission(hub, push):
    hub.commit("org/theirs", {".gitattributes": b""})
    before = hub.repositories["org/theirs"].refs["main"]
    done = pushed(push("--json", "--create-pr", to="org/theirs"))
    repository = hub.repositories["org/theirs"]
    assert done["url"] == f"{hub.url}/org/theirs/discussions/1"
    assert (repository.refs["main"], repository.refs["refs/pr/1"]) == (before, done["commit"])


def test_token_option_is_used_and_precedes_the_environment(push):
    assert pushed(push("--json", "--token", OWNER_TOKEN, token=EXPIRED_TOKEN))["commit"]


def test_result_goes_to_stdout_and_progress_to_stderr(hub, export, tmp_path):
    """In a process of its own, as a user runs it."""
    done = loopexport_process(hub, tmp_path / "home", "push", export, REPO)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1].startswith("Pushed to http")
    assert "%" not in done.stdout


def test_files_of_the_last_push_that_this_one_lacks_are_deleted(hub, push, export):
    pushed(push("--json"))
    hub.commit(REPO, {**hub.repositories[REPO].files(), "notes.md": b"mine"})
    edit_manifest(export, lambda values: values["files"].pop("tokenizer_config.json"))
    (export / "tokenizer_config.json").unlink()
    values = pushed(push("--json"))
    assert {file["name"] for file in values["files"] if file["how"] == "deleted"} == {"tokenizer_config.json"}
    files = hub.repositories[REPO].files()
    assert "tokenizer_config.json" not in files
    assert files["notes.md"] == b"mine"


def test_gitignore_of_the_target_drops_nothing(hub, push, export):
    hub.commit(REPO, {".gitignore": b"*.safetensors\n*.py\n"})
    pushed(push("--json", "--no-server-copy"))
    assert set(weights(export)) | set(templates.FILES) <= set(hub.repositories[REPO].files())


def test_gitignore_that_cannot_be_overridden_stops_the_push(hub, push):
    hub.commit(REPO, {".gitignore": b"*.py\n"})
    hub.takes_gitignore = False
    assert_refused(push(), f"the .gitignore of {REPO} excludes configuration_looped.py")
    assert len(hub.repositories[REPO].commits) == 1


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_config.json", "model.onnx"])
def test_what_would_be_loaded_beside_the_export_stops_the_push(hub, push, name):
    hub.commit(REPO, {name: b"other"})
    assert_refused(push(), f"{REPO} holds {name} of another model, and transformers would load it with this one")
    assert writes(hub) == []


def test_public_repository_is_not_pushed_to_when_private_was_asked_for(hub, push):
    hub.commit(REPO, {".gitattributes": b""})
    assert_refused(push("--private"), f"{REPO} exists and is public")
    assert writes(hub) == []
