"""`convert --push` and the example that publishes a preset."""

from __future__ import annotations

import json
import subprocess
import sys

import yaml

from support.commands import SPEC, tree
from support.hub_requests import STRANGER_TOKEN
from support.paths import EXAMPLES
from support.push import (
    BASE,
    REPO,
    assert_refused,
    bytes_received,
    copies,
    environment,
    load,
    loopexport_command,
    pushed,
    weights,
)
from support.tiny import save_tiny
from support.unrolled import slices


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


def test_slices_of_mergekit_are_published_as_a_path(hub, tmp_path):
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(slices(BASE, [(0, 4), (2, 4), (1, 3), (5, 6)])))
    values = pushed(
        loopexport_command(
            hub, tmp_path / "home", "convert", BASE, tmp_path / "out", "--from-mergekit", tmp_path / "merge.yml",
            "--push", REPO, "--json",
        )
    )  # fmt: skip
    assert not any("slices of" in warning for warning in values["warnings"])
    card = hub.repositories[REPO].files()["README.md"].decode()
    assert "layers 1 to 3 of its 6 layers applied more than once, and layer 4 left out" in card
    assert json.loads(hub.repositories[REPO].files()["config.json"])["loop_path"] == [[0, 4], [2, 4], [1, 3], [5, 6]]


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
    assert f"run `loopexport push {tmp_path / 'out'} {REPO}` to continue" in done.stderr
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
