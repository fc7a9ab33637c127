"""Exports of earlier versions stay valid: verified, run, pushed, restored and exported to ONNX as today's are."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import loopexport
from loopexport import templates
from loopexport.export.own_code import EARLIER_SETS
from support.commands import checks, run, sha256, tree
from support.compare import assert_bitwise
from support.earlier_versions import NAMES, earlier_export
from support.forwards import full_forward
from support.hub_double import HubDouble
from support.paths import ROOT
from support.push import HAS_COPY, REPO, loopexport_command, pushed
from support.tiny import SPAN, tiny_tokens

# The template of the commits up to c5c5c55: two files.
TWO_FILES = ROOT / "tests" / "data" / "templates-two-files"
PROMPT = torch.arange(7, 16)[None]
LOOPS = (
    {"kv": "per_step"},
    {"kv": "reference", "rule": "anderson", "steps": 4},
    {"mode": "layer", "anchor": 0.5, "norm_interpolation": True},
)


@pytest.fixture
def earlier(tiny_base, tmp_path):
    """`earlier(**spec)`: an export as the version of two files wrote it."""

    def make(family="llama", **spec):
        out = loopexport.convert(
            str(tiny_base(family)), tmp_path / "earlier", **{"span": SPAN, "steps": 3, **spec}
        ).root
        manifest = json.loads((out / "loopexport.json").read_text())
        for name in templates.FILES:
            (out / name).unlink()
            manifest["files"].pop(name, None)
        for path in sorted(TWO_FILES.glob("*.py")):
            shutil.copyfile(path, out / path.name)
            manifest["files"][path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
        (out / "loopexport.json").write_text(json.dumps(manifest, indent=2) + "\n")
        return out

    return make


def test_the_two_files_are_those_of_the_earlier_set():
    assert {path.name: sha256(path) for path in TWO_FILES.glob("*.py")} == EARLIER_SETS[0]


@pytest.mark.parametrize(
    ("family", "spec"),
    [*(("llama", loop) for loop in LOOPS), ("gemma3_text", {}), ("qwen3_moe", {"frozen_routing": True})],
)
def test_earlier_export_computes_what_todays_computes(earlier, looped, family, spec):
    theirs = AutoModelForCausalLM.from_pretrained(earlier(family, **spec), trust_remote_code=True).eval()
    ours, tokens = looped(family, **spec), tiny_tokens(2, 12)
    assert_bitwise(full_forward(ours, tokens), full_forward(theirs, tokens))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(ours.generate(tokens, **options), theirs.generate(tokens, **options))


@pytest.mark.parametrize("name", NAMES)
def test_upgraded_export_is_loaded_where_its_earlier_code_ran(name, tmp_path):
    """transformers 4 runs a changed file again in the same module, where the classes of the earlier code still are."""
    root = earlier_export(name, tmp_path / f"upgraded_{name}")
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    before = AutoModelForCausalLM.from_pretrained(root, trust_remote_code=True).generate(PROMPT, **options)
    loopexport.upgrade(root)
    model = AutoModelForCausalLM.from_pretrained(root, trust_remote_code=True)
    assert "LoopedGenerationMixin" in [each.__name__ for each in type(model).__mro__]
    assert torch.equal(model.generate(PROMPT, **options), before)


def test_earlier_export_is_verified_and_restored(earlier, tiny_base, tmp_path):
    root = earlier()
    outcome, status = checks(root, "--full")
    assert status == 0, outcome
    assert all(check["passed"] for check in outcome.values())
    result = run("restore", root, tmp_path / "again")
    assert result.exit_code == 0, result.stderr
    assert tree(tmp_path / "again") == tree(tiny_base("llama"))


def test_earlier_export_whose_code_was_changed_is_not_intact(earlier):
    root = earlier()
    with (root / "modeling_looped.py").open("a") as file:
        file.write("# changed\n")
    assert checks(root, "--files-only")[1] == 1


def test_earlier_export_is_pushed(earlier, tmp_path):
    root, hub = earlier(), HubDouble()
    done = loopexport_command(hub, tmp_path / "home", "push", root, REPO, "--json")
    assert pushed(done)["commit"]
    files = hub.repositories[REPO].files()
    hub.shutdown()
    assert {name for name in files if name.endswith(".py")} == {path.name for path in TWO_FILES.glob("*.py")}
    assert all(files[path.name] == path.read_bytes() for path in TWO_FILES.glob("*.py"))
    assert HAS_COPY or pushed(done)["bytes_copied"] == 0
