"""`verify`, `inspect` and `restore`: what holds is reported with its largest difference, what does not fails."""

from __future__ import annotations

import json
import os
import shutil

import pytest

import loopexport
from loopexport import templates
from loopexport.base.checkpoint import open_checkpoint
from loopexport.templates.configuration_looped import CODE_DIGEST
from support.commands import checks, run, sha256, tree
from support.damage import edit_config, flip_last_byte
from support.structure import by_class
from support.tiny import FAMILIES, SPAN


@pytest.fixture
def export(export_dir, tmp_path):
    """A copy of an export that a test may damage."""
    return shutil.copytree(export_dir("llama"), tmp_path / "export")


@pytest.mark.parametrize("family", by_class(FAMILIES))
def test_every_family_passes(export_dir, family):
    outcome, status = checks(export_dir(family), "--full")
    assert status == 0, outcome
    assert all(check["passed"] for check in outcome.values())
    assert outcome["steps 1 is bitwise the base model"]["difference"] == 0
    assert outcome["anchor 1 is bitwise the base model"]["difference"] == 0
    assert 0 < outcome["cached decode equals the full forward"]["difference"] < 1e-3
    assert outcome["weights are the base's"]["detail"] == "1 compared by xxh3_128"


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"kv": "reference"}, "under kv reference"),
        ({"decode": "bypass"}, "decode bypass"),
        ({"decode": "first_n", "first_n": 2}, "decode first_n"),
    ],
)
def test_decoding_that_differs_by_design_is_told_with_its_size(export_dir, spec, reason):
    outcome, status = checks(export_dir("llama", **spec))
    check = outcome["cached decode equals the full forward"]
    assert status == 0
    assert check["passed"] is None
    assert check["difference"] > 1e-3
    assert f"does not hold by design: {reason}" in check["detail"]


DAMAGE = {
    "template": (lambda root: flip_last_byte(root / "modeling_looped.py"), "modeling_looped.py has changed"),
    "missing file": (lambda root: (root / "generation_config.json").unlink(), "generation_config.json is missing"),
    "original": (lambda root: flip_last_byte(root / "base" / "config.json"), "base/config.json has changed"),
    "config": (lambda root: edit_config(root, rms_norm_eps=0.1), "differs from the base's in rms_norm_eps"),
    "short weights": (lambda root: os.truncate(root / "model.safetensors", 9999), "(size)"),
    "no weights": (lambda root: (root / "model.safetensors").unlink(), "model.safetensors is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_exits_with_1(export, kind):
    damage, says = DAMAGE[kind]
    damage(export)
    outcome, status = checks(export, "--files-only")
    failed = [check["detail"] for check in outcome.values() if not check["passed"]]
    assert status == 1
    assert [detail for detail in failed if says in detail], failed


def test_one_flipped_bit_of_the_weights_is_found_by_a_full_check(export):
    flip_last_byte(export / "model.safetensors")
    assert checks(export, "--files-only")[1] == 0
    outcome, status = checks(export, "--files-only", "--full")
    assert status == 1
    assert outcome["weights are the base's"]["detail"] == "model.safetensors has changed (xxh3_128)"


def test_model_that_computes_something_else_fails(export, monkeypatch):
    """A broken template that is recorded as genuine: the files pass, the numbers do not."""
    source = (export / "looped_decoder.py").read_text()
    broken = source.replace("if walk is None else walk.visit(layers)", "if walk is None else walk.visit(layers)[1:]")
    assert broken != source
    broken = broken.replace("            return None\n        return Walk(", "            pass\n        return Walk(")
    (export / "looped_decoder.py").write_text(broken)
    config = (export / "configuration_looped.py").read_text().replace(CODE_DIGEST, "f" * 16)
    (export / "configuration_looped.py").write_text(config)
    manifest = json.loads((export / "loopexport.json").read_text())
    for name in templates.FILES:
        manifest["files"][name]["sha256"] = sha256(export / name)
    (export / "loopexport.json").write_text(json.dumps(manifest))
    refused = run("verify", export)
    assert refused.exit_code == 1
    assert "use --trust-remote-code" in refused.stderr
    outcome, status = checks(export, "--trust-remote-code")
    assert status == 1
    assert outcome["steps 1 is bitwise the base model"]["passed"] is False
    assert outcome["steps 1 is bitwise the base model"]["difference"] > 1e-3


def test_edited_loop_passes_and_is_mentioned(export):
    edit_config(export, loop_steps=5)
    outcome, status = checks(export)
    assert status == 0, outcome
    assert "the loop was edited" in outcome["config is the base's plus the loop"]["detail"]
    assert "5 steps" in run("inspect", export).stdout


def test_impossible_edited_loop_is_refused_in_one_line(export):
    edit_config(export, loop_steps=0)
    for command in ("verify", "inspect"):
        result = run(command, export)
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert "steps 0" in result.stderr


def test_vllm_is_not_asked_where_only_files_are_checked(export):
    result = run("verify", export, "--files-only", "--runtime", "vllm")
    assert (result.exit_code, "leave one out" in result.stderr) == (2, True)


def test_misspelt_field_is_told_and_not_passed_over(export):
    edit_config(export, loop_dampng=0.5)
    for command in ("verify", "inspect"):
        result = run(command, export)
        assert result.exit_code == 1
        assert "has loop_dampng, which is not a field of the loop; did you mean loop_damping?" in result.stderr


def test_own_card_may_be_edited(export):
    (export / "README.md").write_text("my own words")
    assert checks(export, "--files-only")[1] == 0


def test_inspect_shows_spec_cost_and_origin(export_dir):
    text = run("inspect", export_dir("llama", kv="per_step")).stdout
    for part in ("Base     llama: llama, 6 layers", "Span     1:4", "3 steps", "kv per_step", "2.00x", "by copy"):
        assert part in text, part
    values = json.loads(run("inspect", export_dir("llama"), "--json").stdout)
    assert values["manifest"]["base"]["name"] == "llama"
    assert values["cost"]["layer_evaluations"] == 12
    assert values["spec"]["loop_span"] == list(SPAN)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("weights", ["copy", "hardlink", "auto"])
def test_restore_gives_the_base_back_bit_for_bit(tiny_base, tmp_path, family, weights):
    base = shutil.copytree(tiny_base(family), tmp_path / "base")
    (base / "README.md").write_text("# The base's own card\n")
    (base / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["a.B", null]}}')
    (base / "LICENSE").write_text("free")
    out = loopexport.convert(str(base), tmp_path / "out", span=SPAN, steps=3).root
    edit_config(out, loop_steps=5)
    result = run("restore", out, tmp_path / "again", "--weights", weights)
    assert result.exit_code == 0, result.stderr
    assert tree(tmp_path / "again") == tree(base)
    assert open_checkpoint(tmp_path / "again").model_type == family


def test_restore_leaves_out_the_notice_that_the_conversion_added(tiny_base, tmp_path):
    base = shutil.copytree(tiny_base("llama"), tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: gemma\n---\n")
    out = loopexport.convert(str(base), tmp_path / "out", span=SPAN, steps=3).root
    assert "Gemma Terms of Use" in (out / "NOTICE").read_text()
    assert run("verify", out, "--files-only").exit_code == 0
    assert run("restore", out, tmp_path / "again").exit_code == 0
    assert tree(tmp_path / "again") == tree(base)


def test_restore_refuses_a_damaged_export_and_an_existing_output(export, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    assert "exists" in run("restore", export, tmp_path / "there").stderr
    flip_last_byte(export / "base" / "config.json")
    result = run("restore", export, tmp_path / "again")
    assert result.exit_code == 1
    assert "base/config.json has changed" in result.stderr
    assert not (tmp_path / "again").exists()


def test_inspect_names_what_was_edited_and_what_to_know(export):
    assert "Edited" not in run("inspect", export).stdout
    edit_config(export, loop_steps=5, loop_anchor=0.5)
    text = run("inspect", export).stdout
    assert "Edited   since: steps 3 -> 5, anchor 0.0 -> 0.5\n" in text
    assert "Note     a gain is unproven for this model and this loop" in text
    values = json.loads(run("inspect", export, "--json").stdout)
    assert values["edited"] == {"steps": [3, 5], "anchor": [0.0, 0.5]}
    assert values["notices"][0].startswith("a gain is unproven")


def test_restore_never_passes_damaged_weights_on(export, tmp_path):
    flip_last_byte(export / "model.safetensors")
    result = run("restore", export, tmp_path / "again")
    assert result.exit_code == 1
    assert "model.safetensors has changed (xxh3_128)" in result.stderr
    assert not (tmp_path / "again").exists()


def test_a_full_check_does_not_claim_what_it_cannot_know(tiny_base, tmp_path):
    out = loopexport.convert(str(tiny_base()), tmp_path / "out", span=SPAN, steps=3, weights="hardlink").root
    outcome, status = checks(out, "--files-only", "--full")
    assert status == 0
    assert outcome["weights are the base's"]["passed"] is None
    assert "linked weights have no recorded digest" in outcome["weights are the base's"]["detail"]


def test_restore_onto_something_says_what_to_do(export, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").write_text("x")
    result = run("restore", export, tmp_path / "there")
    assert "there exists; choose a new directory, or remove it first" in result.stderr
