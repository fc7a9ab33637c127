"""`push`: one commit, no byte twice, nothing that must not leave, and a failure can simply be tried again."""

from __future__ import annotations

import inspect
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import transformers
import xxhash
from tokenizers import Tokenizer, models, pre_tokenizers

import loopexport
from loopexport import templates
from loopexport.export.card import read_metadata
from loopexport.export.small_files import export_card
from loopexport.hub.allowlist import allowed_files
from loopexport.hub.transfers import large_transfers
from support.commands import SPEC, run, sha256, tree
from support.hub_double import EXPIRED_TOKEN, OWNER_TOKEN, STRANGER_TOKEN, HubDouble
from support.paths import EXAMPLES
from support.tiny import SPAN, VOCAB, save_tiny, tiny_model

# Clients below version 2 neither copy between repositories nor check the permission to write in advance.
HAS_COPY = "src_repo_id" in inspect.signature(huggingface_hub.CommitOperationCopy).parameters
copies = pytest.mark.skipif(not HAS_COPY, reason="this huggingface_hub cannot copy between repositories")

# The command line; the client's waits before it tries again are cut short.
RUN = """
import sys, time
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.01))
from loopexport.cli.commands import main
main(sys.argv[1:], prog_name="loopexport")
"""
BASE = "org/base"
REPO = "me/Looped"
CARD = "---\nlicense: apache-2.0\nlanguage: [en]\n---\n# Base\n"


def environment(hub, home, token=OWNER_TOKEN):
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    settings |= {"HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "5"}
    return {**os.environ, **settings, **({"HF_TOKEN": token} if token else {})}


def loopexport_command(hub, home, *arguments, token=OWNER_TOKEN):
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(hub, home, token))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base of three shards with a tokenizer's files, as its repository has it."""
    root = tmp_path_factory.mktemp("push") / "base"
    tiny_model("llama").save_pretrained(root, max_shard_size="400KB")
    (root / "README.md").write_text(CARD)
    (root / "LICENSE").write_text("free\n")
    (root / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCAB)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(root / "tokenizer.json"))
    return root


@pytest.fixture
def hub(base):
    """The Hub, with the base on it; the base's commit is the same in every test."""
    server = HubDouble()
    server.add(BASE, base)
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def converted(base, tmp_path_factory):
    """An export of the base on the Hub."""
    folder = tmp_path_factory.mktemp("converted")
    server = HubDouble()
    server.add(BASE, base)
    done = loopexport_command(server, folder / "home", "convert", BASE, folder / "out", *SPEC)
    server.shutdown()
    assert done.returncode == 0, done.stderr
    return folder / "out"


@pytest.fixture
def export(converted, tmp_path):
    """A copy of it that a test may change."""
    return shutil.copytree(converted, tmp_path / "export")


@pytest.fixture
def push(hub, export, tmp_path):
    """`push(*options, to=REPO, token=...)`: push the export in a process of its own; the finished process."""

    def run(*options, to=REPO, token=OWNER_TOKEN):
        return loopexport_command(hub, tmp_path / "home", "push", export, to, *options, token=token)

    return run


def pushed(done):
    """The JSON object that a successful push printed."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_refused(done, says):
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, done.stderr
    assert says in errors[0], errors
    assert "Traceback" not in done.stderr


def weights(root):
    return {path.name: sha256(path) for path in root.glob("*.safetensors")}


def bytes_received(hub):
    return sum(hub.received.values())


def writes(hub):
    """What the Hub was asked to change."""
    reads = ("/paths-info/", "/api/validate-yaml")
    return [
        (method, path) for method, path in hub.asked if method in ("POST", "PUT") and not any(r in path for r in reads)
    ]


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


def test_result_goes_to_stdout_and_progress_to_stderr(push):
    done = push()
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1].startswith("Pushed to http")
    assert "%" not in done.stdout


# Weights


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
        assert done.stderr.count("no digest is known of model.safetensors, which was linked") == count


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
    assert_refused(push(), f"the .gitignore of {REPO} drops configuration_looped.py")
    assert len(hub.repositories[REPO].commits) == 1


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_config.json", "model.onnx"])
def test_what_would_be_loaded_beside_the_export_stops_the_push(hub, push, name):
    hub.commit(REPO, {name: b"other"})
    assert_refused(push(), f"{REPO} holds {name} of another model, which would be loaded as part of this one")
    assert writes(hub) == []


def test_public_repository_is_not_pushed_to_when_private_was_asked_for(hub, push):
    hub.commit(REPO, {".gitattributes": b""})
    assert_refused(push("--private"), f"{REPO} exists and is public")
    assert writes(hub) == []


# What must not leave


def edit_manifest(root, change):
    values = json.loads((root / "loopexport.json").read_text())
    change(values)
    (root / "loopexport.json").write_text(json.dumps(values, indent=2) + "\n")


def write_listed(root, name, text):
    """Write a file and list it in the manifest, as if the conversion had written it."""
    (root / name).write_text(text)
    record = {"size": len(text.encode()), "sha256": sha256(root / name)}
    edit_manifest(root, lambda values: values["files"].update({name: record}))


def make_local(root):
    edit_manifest(root, lambda values: values["base"].update(revision=None, name="base"))


def flip_last_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def link(root, name, to):
    (root / name).symlink_to(to)


TOKEN = "hf_" + "a1B2" * 8
LEAKS = {
    ".env": (lambda root: (root / ".env").write_text("A=1"), ".env looks like a file with secrets"),
    "key": (lambda root: (root / "base" / "id_rsa").write_text("x"), "base/id_rsa looks like a file with secrets"),
    "file link": (lambda root: link(root, "LICENSE.md", "/etc/hostname"), "LICENSE.md is a symbolic link"),
    "folder link": (lambda root: link(root, "more", "/etc"), "more is a symbolic link"),
    "pickle": (lambda root: (root / "pytorch_model.bin").write_bytes(b"x"), "pytorch_model.bin may be a pickle"),
    "deep pickle": (lambda root: (root / "base" / "x.pt").write_bytes(b"x"), "base/x.pt may be a pickle"),
    "licence": (lambda root: (root / "LICENSE.pkl").write_bytes(b"x"), "LICENSE.pkl may be a pickle"),
    "code": (lambda root: (root / "modeling_evil.py").write_text("x"), "modeling_evil.py is code"),
    "listed code": (lambda root: write_listed(root, "evil.py", "x"), "evil.py is code"),
    "pipe": (lambda root: os.mkfifo(root / "pipe"), "pipe is neither a file nor a directory"),
    "token in config": (
        lambda root: write_listed(root, "generation_config.json", json.dumps({"token": TOKEN})),
        "generation_config.json contains something like a secret (hf_a1B...)",
    ),
    "token in card": (
        lambda root: (root / "README.md").write_text(f"export HF_TOKEN={TOKEN}"),
        "README.md contains something like a secret",
    ),
    "absolute path": (
        lambda root: (make_local(root), write_listed(root, "generation_config.json", '{"a": [{"b": "/home/me/x"}]}')),
        "generation_config.json contains the absolute path '/home/me/x'",
    ),
    "absolute Windows path": (
        lambda root: (make_local(root), write_listed(root, "generation_config.json", '{"a": "C:\\\\x"}')),
        "generation_config.json contains the absolute path",
    ),
    "path in the manifest": (
        lambda root: edit_manifest(root, lambda values: values["left_behind"].append("/home/me/x")),
        "loopexport.json contains the absolute path",
    ),
    "foreign tokenizer code": (
        lambda root: write_listed(root, "tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["a.B", null]}}'),
        "the auto_map of tokenizer_config.json is not the installed LoopExport's",
    ),
    "template": (lambda root: flip_last_byte(root / "modeling_looped.py"), "modeling_looped.py has changed"),
    "forged template": (
        lambda root: write_listed(root, "modeling_looped.py", "raise SystemExit"),
        "modeling_looped.py is not the installed LoopExport's",
    ),
    "config": (
        lambda root: (root / "config.json").write_text(
            json.dumps({**json.loads((root / "config.json").read_text()), "auto_map": {"AutoConfig": "x--y.Z"}})
        ),
        "config.json differs from the base's in auto_map",
    ),
    "weights": (lambda root: flip_last_byte(min(root.glob("*.safetensors"))), "has changed (sha256)"),
    "short weights": (lambda root: os.truncate(min(root.glob("*.safetensors")), 999), "has changed (size)"),
    "weights elsewhere": (
        lambda root: edit_manifest(root, lambda values: values["weights"].update({"../x.safetensors": {"size": 1}})),
        "'../x.safetensors' is not a file name inside an export",
    ),
    "missing weights": (
        lambda root: (
            min(root.glob("*.safetensors")).unlink(),
            edit_manifest(root, lambda values: [record.pop("sha256") for record in values["weights"].values()]),
        ),
        "is missing",
    ),
}


@pytest.mark.parametrize("kind", LEAKS)
def test_what_must_not_leave_stops_the_push_and_is_named(hub, push, export, kind):
    spoil, says = LEAKS[kind]
    spoil(export)
    assert_refused(push(), says)
    assert writes(hub) == []
    assert REPO not in hub.repositories


def test_what_is_not_on_the_list_stays_behind(hub, push, export):
    for name in ("notes.txt", "extra.safetensors", "secret.json", "model.onnx", ".git/config", ".cache/x.bin"):
        (export / name).parent.mkdir(exist_ok=True)
        (export / name).write_text("mine")
    write_listed(export, "data.csv", "listed, but not allowed")
    (export / "USE_POLICY.md").write_text("be kind\n")
    before = tree(export)
    values = pushed(push("--json"))
    files = hub.repositories[REPO].files()
    stayed = {"notes.txt", "extra.safetensors", "secret.json", "model.onnx", ".git/config", ".cache/x.bin", "data.csv"}
    assert set(before) - set(files) == stayed
    assert files["USE_POLICY.md"] == b"be kind\n", "licence texts may be added by hand"
    assert {file["name"] for file in values["files"]} == set(files) - {".gitattributes"}
    assert tree(export) == before, "a push changes nothing here"


def test_large_file_that_is_no_weights_is_sent_from_the_disk_and_not_twice(hub, push, export):
    write_listed(export, "tokenizer.json", "{}" + " " * (64 * 2**20))
    pushed(push("--json"))
    assert hub.repositories[REPO].files()["tokenizer.json"] == (export / "tokenizer.json").read_bytes()
    assert {file["how"] for file in pushed(push("--json"))["files"]} == {"there"}
    flip_last_byte(export / "tokenizer.json")
    assert_refused(push(), "tokenizer.json has changed")


def test_paths_that_the_base_has_published_itself_do_not_stop_the_push(push, export):
    write_listed(export, "generation_config.json", '{"_name_or_path": "/data/training/run"}')
    assert pushed(push("--json"))["commit"]


# The card


def edit_remote_card(hub, change):
    files = hub.repositories[REPO].files()
    hub.commit(REPO, {**files, "README.md": change(files["README.md"].decode()).encode()})


def remote_card(hub):
    return hub.repositories[REPO].files()["README.md"].decode()


def test_card_edited_on_the_hub_survives_every_push(hub, push, export):
    pushed(push("--json"))
    edit_remote_card(hub, lambda card: card.replace("- looped\n", "- mine\n") + "\n## My results\n")
    edited = remote_card(hub)
    for steps in (5, 6):
        config = json.loads((export / "config.json").read_text())
        (export / "config.json").write_text(json.dumps({**config, "loop_steps": steps}))
        done = push("--json")
        assert pushed(done)["commit"] == hub.repositories[REPO].refs["main"]
        assert "Note: README.md was edited on the Hub" in done.stderr
        assert remote_card(hub).endswith("\n## My results\n")
        assert read_metadata(remote_card(hub))["tags"] == ["custom_code", "mine", "loopexport", "looped"]
        assert remote_card(hub).split("\n---\n", 1)[1] == edited.split("\n---\n", 1)[1]
    assert push("--json").stderr.count("was edited") == 1
    assert {file["how"] for file in pushed(push("--json"))["files"]} == {"there"}


def test_card_that_nobody_touched_on_the_hub_follows_the_export(hub, push, export):
    pushed(push("--json"))
    (export / "README.md").write_text("---\nlicense: mit\n---\n# My own words\n")
    pushed(push("--json"))
    assert remote_card(hub).endswith("# My own words\n")
    (export / "README.md").write_text("---\nlicense: mit\n---\n# Other words\n")
    pushed(push("--json"))
    assert remote_card(hub).endswith("# Other words\n")


def test_card_that_was_there_first_keeps_its_words_and_gets_the_metadata(hub, push):
    hub.commit(REPO, {"README.md": b"---\nlicense: mit\ntags: [mine]\n---\nmine\n"})
    pushed(push("--json"))
    metadata = read_metadata(remote_card(hub))
    assert remote_card(hub).endswith("---\nmine\n")
    assert (metadata["license"], metadata["base_model"]) == ("mit", BASE)
    assert metadata["tags"] == ["mine", "custom_code", "looped", "loopexport"]


def test_card_of_metadata_alone_gets_the_exports_text(hub, push):
    hub.commit(REPO, {"README.md": b"---\nlicense: mit\n---\n"})
    pushed(push("--json"))
    assert read_metadata(remote_card(hub))["license"] == "mit"
    assert "Gains are not guaranteed" in remote_card(hub)


def test_card_made_of_an_export_is_the_one_that_the_conversion_wrote(converted, weightless):
    for root in (converted, weightless):
        assert export_card(loopexport.open_export(root)) == (root / "README.md").read_text()


def test_card_that_was_deleted_here_is_made_anew(hub, push, export):
    (export / "README.md").unlink()
    pushed(push("--json"))
    assert "Gains are not guaranteed" in remote_card(hub)


# ONNX files


def write_onnx(root, name, content, **record):
    """Write a file and list it in the manifest, as if `loopexport onnx` had written it."""
    (root / name).write_bytes(content)
    kind, digest = "sha256", sha256(root / name)
    if name.endswith("_data"):
        kind, digest = "xxh3_128", xxhash.xxh3_128(content).hexdigest()
    record = {"size": len(content), kind: digest, **record}
    edit_manifest(root, lambda values: values.setdefault("onnx", {}).update({name: record}))


def write_graph(root, data="model_fp16.onnx_data"):
    graph = {"steps": 3, "dtype": "fp16", "attention": "portable", "spec": {"span": list(SPAN), "steps": 3}}
    write_onnx(root, "model_fp16.onnx_data", b"data" * 999)
    write_onnx(root, "model_fp16.onnx", b"graph", **graph, data=[data])
    write_onnx(root, "genai_config.json", b"{}")


def edit_loop(root, steps):
    config = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps({**config, "loop_steps": steps}))


ONNX_LEAKS = {
    "graph": (lambda root: flip_last_byte(root / "model_fp16.onnx"), r"model_fp16.onnx has changed \(sha256\)"),
    "missing graph": (lambda root: (root / "model_fp16.onnx").unlink(), "model_fp16.onnx is missing"),
    "data": (lambda root: flip_last_byte(root / "model_fp16.onnx_data"), r"model_fp16.onnx_data .* \(xxh3_128\)"),
    "missing data": (lambda root: (root / "model_fp16.onnx_data").unlink(), "model_fp16.onnx_data is missing"),
    "config": (lambda root: flip_last_byte(root / "genai_config.json"), "genai_config.json has changed"),
    "token": (lambda root: write_onnx(root, "model.onnx", f"x {TOKEN}".encode()), "model.onnx contains something like"),
    "edited loop": (lambda root: edit_loop(root, 2), r"another loop \(loop_steps 3 -> 2\): run `loopexport onnx"),
    "other name": (lambda root: write_onnx(root, "evil.onnx", b"x"), "'evil.onnx', which LoopExport never writes"),
    "foreign data": (
        lambda root: write_graph(root, "secret.txt"),
        "model_fp16.onnx reads secret.txt, which is not part",
    ),
}


@pytest.mark.parametrize("kind", ONNX_LEAKS)
def test_onnx_files_that_are_not_as_written_stop_the_push(export, kind):
    spoil, says = ONNX_LEAKS[kind]
    write_graph(export)
    spoil(export)
    with pytest.raises(loopexport.LoopExportError, match=says):
        check_outgoing(loopexport.open_export(export))


def check_outgoing(export):
    large_transfers(export, allowed_files(export).large, lambda count: None)


def test_onnx_files_that_are_made_no_more_are_deleted_from_the_hub(hub, push, export):
    write_graph(export)
    names = {"model_fp16.onnx", "model_fp16.onnx_data", "genai_config.json"}
    pushed(push("--json"))
    assert names <= set(hub.repositories[REPO].files())
    edit_manifest(export, lambda values: values.pop("onnx"))
    assert {file["name"] for file in pushed(push("--json"))["files"] if file["how"] == "deleted"} == names
    assert not names & set(hub.repositories[REPO].files())


@pytest.fixture(scope="module")
def with_graphs(converted, tmp_path_factory):
    """The export with a graph on its three shards."""
    onnx = pytest.importorskip("loopexport.onnx")
    for name in ("onnxruntime", "onnxscript"):
        pytest.importorskip(name)
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("ONNX export needs transformers 5")
    root = shutil.copytree(converted, tmp_path_factory.mktemp("graphs") / "export")
    onnx.export_onnx(root, verify=False)
    return root


FETCH = "import sys, huggingface_hub; print(huggingface_hub.snapshot_download(sys.argv[1]))"


@copies
@pytest.mark.xdist_group("pushed graphs")  # one export to ONNX serves them all
def test_pushed_graphs_read_the_pushed_weights_and_give_the_tokens_of_the_local_ones(hub, with_graphs, tmp_path):
    home = tmp_path / "home"
    done = pushed(loopexport_command(hub, home, "push", with_graphs, REPO, "--json"))
    sent = sum(path.stat().st_size for path in with_graphs.glob("*.onnx*"))
    assert bytes_received(hub) == sent, "the weights were copied there"
    assert done["bytes_copied"] == sum((with_graphs / name).stat().st_size for name in weights(with_graphs))
    again = pushed(loopexport_command(hub, home, "push", with_graphs, REPO, "--json"))
    assert {file["how"] for file in again["files"]} == {"there"}
    fetch = [sys.executable, "-c", FETCH, REPO]
    fetched = subprocess.run(fetch, capture_output=True, text=True, env=environment(hub, home), check=True)
    there = Path(fetched.stdout.strip())
    assert all(check.passed for check in loopexport.verify(there, files_only=True, full=True))
    record = json.loads((there / "loopexport.json").read_text())["onnx"]["model.onnx"]
    assert external_files(there / "model.onnx") == record["data"] == sorted(weights(there))
    ours, theirs = (run("run", root, "w5 w6 w7", "--max-new-tokens", "9") for root in (there, with_graphs))
    assert ours.stdout == theirs.stdout
    assert len(ours.stdout.split()) == 9, ours.stderr
    run_examples((there / "README.md").read_text(), there)


def external_files(path):
    """Names of the files that a graph reads, sorted."""
    graph = pytest.importorskip("onnx_ir").load(path).graph
    tensors = [value.const_value for value in graph.initializers.values()]
    return sorted({tensor.location for tensor in tensors if hasattr(tensor, "location")})


def run_examples(card, root):
    """Run the card's examples for ONNX Runtime and onnxruntime-genai."""
    pytest.importorskip("onnxruntime_genai")
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code = "".join(block for block in blocks if "OnnxModel" in block or "onnxruntime_genai" in block)
    code = code.replace(f'snapshot_download("{REPO}")', repr(str(root)))
    assert "OnnxModel(path" in code
    assert "onnxruntime_genai.Model(path)" in code
    exec(code, {})


@copies
@pytest.mark.xdist_group("pushed graphs")
@pytest.mark.parametrize("mode", ["uploaded", "removed"])
def test_onnx_files_go_along_however_the_weights_travel(hub, with_graphs, tmp_path, mode):
    root = shutil.copytree(with_graphs, tmp_path / "export")
    write_graph(root)
    expected = {path.name: path.read_bytes() for path in (*root.glob("*.onnx*"), *root.glob("*.safetensors"))}
    if mode == "removed":
        for name in weights(root):
            (root / name).unlink()
    option = ["--no-server-copy"] if mode == "uploaded" else []
    pushed(loopexport_command(hub, tmp_path / "home", "push", root, REPO, "--json", *option))
    files = hub.repositories[REPO].files()
    assert {name: files[name] for name in expected} == expected
    card = files["README.md"].decode()
    assert "| `model.onnx` | 3 | fp32 | portable | 3 `.safetensors` files |" in card
    assert "| `model_fp16.onnx` | 3 | fp16 | portable | `model_fp16.onnx_data` |" in card


def test_graphs_are_made_of_weights_that_are_here(weightless):
    pytest.importorskip("onnxscript")
    result = run("onnx", weightless)
    assert result.exit_code == 1
    assert "and a graph is made from the weights: convert with them" in result.stderr


# Exports without weights


@pytest.fixture
def weightless(hub, tmp_path):
    done = loopexport_command(hub, tmp_path / "home", "convert", BASE, tmp_path / "out", *SPEC, "--weights", "none")
    assert done.returncode == 0, done.stderr
    return tmp_path / "out"


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


# Failures

SECOND = r"/objects/.*{second}"  # the upload of the second shard
FAILURES = {
    "expired token": ("GET", "whoami", {"status": 401}, "the Hub does not accept the token"),
    "too many requests": (
        "GET",
        "whoami",
        {"status": 429, "headers": {"Retry-After": "7"}},
        "wait 7 s and run the same",
    ),
    "trouble at the start": ("GET", "/api/models/me/", {"status": 500}, "the Hub has an error of its own (500"),
    "no connection": ("GET", "whoami", {"drop": True}, "the connection to the Hub broke"),
    "name taken meanwhile": ("POST", "/repos/create", {"status": 403}, "you may not write to me/Looped"),
    "preupload fails": ("POST", "/preupload/", {"status": 503}, "the Hub has an error of its own (503"),
    "vanished": ("POST", "/preupload/", {"status": 404, "code": "RepoNotFound"}, "the Hub has no me/Looped"),
    "batch fails": ("POST", "/objects/batch", {"status": 500}, "the Hub has an error of its own (500"),
    "quota": (
        "POST",
        "/objects/batch",
        {"status": 403, "message": "storage limit reached"},
        "does not accept the files",
    ),
    "upload fails": ("PUT", SECOND, {"status": 500}, "the Hub has an error of its own (500"),
    "token expires": ("PUT", SECOND, {"status": 401}, "the Hub does not accept the token"),
    "upload is cut": ("PUT", SECOND, {"drop_after_bytes": 70_000}, "the connection to the Hub broke"),
    "verify fails": ("POST", rf"{SECOND}/verify", {"status": 500}, "the Hub has an error of its own (500"),
    "commit fails": ("POST", "/commit/", {"status": 500}, "the Hub has an error of its own (500"),
    "commit is limited": ("POST", "/commit/", {"status": 429}, "wait a while and run the same command again"),
    "commit conflicts": ("POST", "/commit/", {"status": 409}, "is being changed by someone else"),
    "branch moved": ("POST", "/commit/", {"status": 412}, "is being changed by someone else"),
    "commit is cut": ("POST", "/commit/", {"drop": True}, "the connection to the Hub broke"),
    "answer is lost": ("POST", "/commit/", {"drop": "late"}, "the connection to the Hub broke"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_failure_is_one_line_and_the_same_command_completes_without_sending_anything_twice(hub, push, export, kind):
    method, pattern, fault, says = FAILURES[kind]
    second = sorted(weights(export).items())[1][1]
    hub.fail(method, pattern.format(second=second), times=99, **fault)
    assert_refused(push("--no-server-copy"), says)
    assert_whole_or_untouched(hub, export, is_whole=kind == "answer is lost")
    hub.faults.clear()
    done = push("--json", "--no-server-copy")
    assert pushed(done)["commit"] == hub.repositories[REPO].refs["main"]
    assert_whole_or_untouched(hub, export, is_whole=True)
    sizes = {digest: (export / name).stat().st_size for name, digest in weights(export).items()}
    if method == "PUT":
        del sizes[second]
    assert {digest: hub.received[digest] for digest in sizes} == sizes


def assert_whole_or_untouched(hub, export, is_whole):
    """The branch holds the whole export, or nothing of it."""
    repository = hub.repositories.get(REPO)
    names = set() if repository is None else set(repository.files()) - {".gitattributes"}
    assert names == (set(tree(export)) if is_whole else set())


def test_quota_of_the_object_store_is_told(hub, push):
    hub.quota_bytes = 1000
    assert_refused(push("--no-server-copy"), "does not accept the files of me/Looped: Private repository storage limit")


@pytest.mark.parametrize(
    ("token", "to", "says"),
    [
        (EXPIRED_TOKEN, REPO, "the Hub does not accept the token"),
        (None, REPO, "no Hub token; log in (`hf auth login`), set HF_TOKEN, or give --token"),
        (STRANGER_TOKEN, REPO, "you may not write to me/Looped"),
        (STRANGER_TOKEN, "team/there", "you may not write to team/there"),
        (OWNER_TOKEN, "a/b/c", "'a/b/c' is not an id of a repository"),
    ],
)
def test_refusals_come_before_any_weight_is_hashed_or_sent(hub, push, token, to, says):
    hub.commit("team/there", {".gitattributes": b""})
    done = push(to=to, token=token)
    assert_refused(done, says)
    assert bytes_received(hub) == 0


def test_offline_mode_is_told(hub, export, tmp_path):
    settings = {**environment(hub, tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", RUN, "push", str(export), REPO]
    assert_refused(subprocess.run(command, capture_output=True, text=True, env=settings), "HF_HUB_OFFLINE is set")


def test_pull_request_of_a_branch_is_refused(push):
    assert_refused(push("--create-pr", "--revision", "other"), "leave out --revision other")


def test_directory_that_is_no_export_is_refused(hub, base, tmp_path):
    assert_refused(loopexport_command(hub, tmp_path / "home", "push", base, REPO), "is not a LoopExport export")


def test_commit_of_someone_else_in_between_is_never_overwritten(hub, push, export):
    hub.commit(REPO, {"theirs.txt": b"1"})
    hub.fail("POST", "/preupload/", delay=1.0)
    process = start_push(hub, export)
    while not any("/preupload/" in path for _, path in hub.asked):
        time.sleep(0.01)
    theirs = hub.commit(REPO, {"theirs.txt": b"2"})
    assert process.wait() == 1
    assert hub.repositories[REPO].refs["main"] == theirs
    assert pushed(push("--json"))["commit"]
    assert hub.repositories[REPO].files()["theirs.txt"] == b"2"


def start_push(hub, export):
    command = [sys.executable, "-c", RUN, "push", str(export), REPO, "--no-server-copy"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, env=environment(hub, Path(export).parent / "home"), **quiet)


def test_killed_between_two_uploads_does_not_send_the_finished_ones_again(hub, push, export):
    finished = dict(sorted(weights(export).items()))
    _, second = finished.popitem()
    hub.fail("PUT", second, delay=5.0)
    process = start_push(hub, export)
    while not (REPO in hub.repositories and set(finished.values()) <= set(hub.repositories[REPO].objects)):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert_whole_or_untouched(hub, export, is_whole=False)
    pushed(push("--json", "--no-server-copy"))
    assert_whole_or_untouched(hub, export, is_whole=True)
    assert all(hub.received[digest] == (export / name).stat().st_size for name, digest in finished.items())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT], ids=["kill", "interrupt"])
def test_killed_at_a_random_moment_leaves_all_or_nothing(hub, push, export, seed, kill):
    hub.fail("POST|PUT", ".", delay=0.1, times=99)
    process = start_push(hub, export)
    while not hub.asked:
        time.sleep(0.01)
    time.sleep(random.Random(seed).uniform(0, 1.5))
    process.send_signal(kill)
    process.wait()
    repository = hub.repositories.get(REPO)
    assert_whole_or_untouched(hub, export, is_whole=repository is not None and "config.json" in repository.files())
    hub.faults.clear()
    pushed(push("--json", "--no-server-copy"))
    assert_whole_or_untouched(hub, export, is_whole=True)


# Conversion and push in one


def test_convert_with_push_publishes_what_it_wrote(hub, tmp_path):
    command = ["convert", BASE, tmp_path / "out", *SPEC, "--push", REPO, "--private", "--json"]
    values = pushed(loopexport_command(hub, tmp_path / "home", *command))
    repository = hub.repositories[REPO]
    assert values["written"]
    assert values["push"]["commit"] == repository.refs["main"]
    assert repository.private
    assert set(repository.files()) - {".gitattributes"} == set(tree(tmp_path / "out"))
    done = loopexport_command(hub, tmp_path / "home", *command[:-2], "--overwrite")
    assert done.returncode == 0, done.stderr
    assert f"Wrote {tmp_path / 'out'}\n" in done.stdout
    assert f"Pushed to {hub.url}/{REPO} as commit {repository.refs['main']}" in done.stdout


@copies
def test_convert_with_push_is_refused_before_it_does_anything(hub, tmp_path):
    hub.commit("team/there", {".gitattributes": b""})
    command = ["convert", BASE, tmp_path / "out", *SPEC, "--push", "team/there"]
    assert_refused(loopexport_command(hub, tmp_path / "home", *command, token=STRANGER_TOKEN), "you may not write")
    assert not (tmp_path / "out").exists()
    assert hub.sent == {}


def test_failed_push_after_a_conversion_can_go_on(hub, tmp_path):
    hub.fail("POST", "/commit/", status=500)
    done = loopexport_command(hub, tmp_path / "home", "convert", BASE, tmp_path / "out", *SPEC, "--push", REPO)
    assert done.returncode == 1
    assert f"`loopexport push {tmp_path / 'out'} {REPO}` goes on with it" in done.stderr
    assert pushed(loopexport_command(hub, tmp_path / "home", "push", tmp_path / "out", REPO, "--json"))["commit"]


@copies
def test_example_publishes_a_preset_without_the_weights_passing_through(hub, tmp_path):
    """On a tiny model of the name, family and depth that the preset was measured on."""
    base, model = (
        save_tiny("qwen3", tmp_path / "base", num_hidden_layers=36, layer_types=None),
        "Qwen/Qwen3-4B-Instruct",
    )
    hub.add(model, base)
    example = EXAMPLES / "publish.py"
    command = [sys.executable, str(example), model, REPO, "qwen3-4b-mmlu-pro"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(hub, tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    commit = hub.repositories[REPO].refs["main"]
    assert commit in done.stdout
    assert "published for this model and loop (replicated): MMLU-Pro" in done.stdout
    files = hub.repositories[REPO].files()
    assert b"Published for this model and loop, replicated" in files["README.md"]
    assert {name: files[name] for name in weights(base)} == {name: (base / name).read_bytes() for name in weights(base)}
    assert bytes_received(hub) == 0
    ours = load(hub, tmp_path, REPO, commit, tmp_path / "ours.pt")
    assert ours["class"] == "LoopedQwen3ForCausalLM"


# The round trip


@pytest.mark.skipif(HAS_COPY, reason="this huggingface_hub can")
def test_client_that_cannot_copy_uploads_and_says_so(hub, push, weightless, tmp_path):
    done = push("--json")
    assert pushed(done)["bytes_copied"] == 0
    assert "this huggingface_hub cannot copy between repositories; install version 2" in done.stderr
    done = loopexport_command(hub, tmp_path / "home", "push", weightless, REPO + "2")
    assert_refused(done, "is not here and the Hub cannot copy it (this huggingface_hub cannot copy")


LOAD = """
import sys
sys.modules["loopexport"] = None  # importing it would fail
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], revision=sys.argv[2] or None, trust_remote_code=True)
tokens = torch.arange(3, 40).reshape(1, -1)
torch.save({"logits": model(tokens).logits, "class": type(model).__name__}, sys.argv[3])
"""


def load(hub, home, model, revision, out):
    import torch

    command = [sys.executable, "-c", LOAD, str(model), revision, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(hub, home), cwd=home)
    assert done.returncode == 0, done.stderr
    return torch.load(out)


@copies
def test_round_trip_computes_the_same_logits_bitwise(hub, weightless, converted, tmp_path):
    """Converted without weights, pushed without a byte of them, loaded from the Hub where LoopExport is not."""
    import torch

    done = loopexport_command(hub, tmp_path / "home", "push", weightless, REPO, "--json")
    commit = pushed(done)["commit"]
    (tmp_path / "elsewhere").mkdir()
    ours = load(hub, tmp_path / "elsewhere", REPO, commit, tmp_path / "ours.pt")
    theirs = load(hub, tmp_path / "elsewhere", converted, "", tmp_path / "theirs.pt")
    assert ours["class"] == theirs["class"] == "LoopedLlamaForCausalLM"
    assert torch.equal(ours["logits"], theirs["logits"])
    assert bytes_received(hub) == 0
