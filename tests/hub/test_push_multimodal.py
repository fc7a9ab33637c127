"""Push of the language model of a multimodal base: the Hub copies the files that are the base's, and no others."""

from __future__ import annotations

import json

import pytest
from transformers import CONFIG_MAPPING

from support.hub_double import HubDouble
from support.multimodal import multimodal_model
from support.push import BASE, CARD, REPO, copies, loopexport_command, pushed

SPEC = ["--span", "2:3", "--steps", "2"]


@pytest.fixture
def hub(tmp_path):
    """The Hub double with a multimodal base of several files, the first of which holds the tower."""
    if "qwen3_5" not in CONFIG_MAPPING:
        pytest.skip("qwen3_5 came with transformers 5")
    base = tmp_path / "base"
    multimodal_model("qwen3_5").save_pretrained(base, max_shard_size="300KB")
    (base / "README.md").write_text(CARD)
    (base / "preprocessor_config.json").write_text("{}")
    server = HubDouble()
    server.add(BASE, base)
    yield server
    server.shutdown()


@copies
def test_shared_files_are_copied_and_rewritten_ones_uploaded(hub, tmp_path):
    index = hub.repositories[BASE].files()["model.safetensors.index.json"]
    home, out = tmp_path / "home", tmp_path / "out"
    done = loopexport_command(hub, home, "convert", BASE, out, *SPEC, "--text-only", "--json")
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert values["weights"]["rewritten"] == []
    sent = pushed(loopexport_command(hub, home, "push", out, REPO, "--json"))
    how = {file["name"]: file["how"] for file in sent["files"] if file["name"].endswith(".safetensors")}
    assert how == dict.fromkeys(sorted(set(json.loads(index)["weight_map"].values()))[1:], "copied")
    assert "preprocessor_config.json" not in hub.repositories[REPO].files()


def test_whole_export_takes_the_processor_along(hub, tmp_path):
    home, out = tmp_path / "home", tmp_path / "out"
    done = loopexport_command(hub, home, "convert", BASE, out, *SPEC)
    assert done.returncode == 0, done.stderr
    pushed(loopexport_command(hub, home, "push", out, REPO, "--json"))
    assert hub.repositories[REPO].files()["preprocessor_config.json"] == b"{}"
    assert b"pipeline_tag: image-text-to-text" in hub.repositories[REPO].files()["README.md"]


def test_plan_reads_headers_from_the_hub_alone(hub, tmp_path):
    arguments = ("convert", BASE, tmp_path / "out", *SPEC, "--text-only", "--dry-run", "--json")
    done = loopexport_command(hub, tmp_path / "home", *arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cost"]["base_layer_evaluations"] == 6
    assert not list((tmp_path / "home").rglob("*.safetensors"))
