"""`loopexport mlx` and `convert --mlx`: one field of the config lets mlx-lm load an export, and nothing else changes.

These tests need no mlx-lm; `tests/checks/test_mlx.py` runs exports in it.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from transformers import AutoConfig

import loopexport
from loopexport.checks import mlx as checks_mlx
from loopexport.checks.mlx import Ran, check_mlx
from loopexport.export.mlx_families import mlx_refusal, mlx_warnings
from loopexport.export.mlx_plan import why_not_on_mlx
from loopexport.hub.allowlist import allowed_files
from loopexport.loop.spec import LoopSpec
from loopexport.templates.looped_mlx_limits import MODEL_FILE, is_too_old, mlx_config_fields, mlx_loop_refusal
from support.commands import SPEC, checks, run, tree
from support.damage import edit_config
from support.earlier_versions import earlier_export
from support.mlx_configs import FULL, NOT_READ, SLIDING, THIRD, YARN, rope
from support.refusals import assert_refused
from support.tiny import SPAN
from support.trained import save_trained

CODE = {
    "modeling_looped_mlx.py",
    "looped_mlx.py",
    "looped_mlx_model.py",
    "looped_mlx_routing.py",
    "looped_mlx_limits.py",
}


@pytest.fixture
def export(export_dir, tmp_path):
    """A copy of an export that a test may change."""
    return shutil.copytree(export_dir(), tmp_path / "looped")


def config_of(root):
    return json.loads((root / "config.json").read_text())


def differing(before, after):
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def test_one_field_is_added_and_everything_else_stays(export):
    before, config = tree(export), config_of(export)
    planned = run("mlx", export, "--dry-run")
    assert planned.stdout.endswith("Dry run: nothing was written.\n")
    assert tree(export) == before
    done = run("mlx", export)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"mlx-lm loads {export} now: mlx_lm.generate --model {export}")
    assert differing(before, tree(export)) == {"config.json", "README.md", "loopexport.json"}
    assert config_of(export) == {**config, "model_file": MODEL_FILE}
    assert "### MLX" in (export / "README.md").read_text()
    assert checks(export, "--files-only")[1] == 0
    assert set(tree(export)) >= CODE


def test_a_second_time_changes_nothing(export):
    run("mlx", export)
    before = tree(export)
    again = run("mlx", export)
    assert again.stdout == f"mlx-lm loads {export} already\n"
    values = json.loads(run("mlx", export, "--json").stdout)
    assert values == {
        "directory": str(export),
        "is_current": True,
        "model_file": MODEL_FILE,
        "warnings": [],
        "written": False,
    }
    assert tree(export) == before
    assert "MLX      mlx-lm loads it" in run("inspect", export).stdout
    assert json.loads(run("inspect", export, "--json").stdout)["mlx"]


def test_an_edited_card_stays(export):
    (export / "README.md").write_text("mine\n")
    done = run("mlx", export)
    assert "Note     README.md was edited, so it stays as it is" in done.stdout
    assert (export / "README.md").read_text() == "mine\n"


def test_convert_does_it_at_once(tiny_base, tmp_path):
    at_once, later = tmp_path / "one" / "looped", tmp_path / "two" / "looped"
    done = run("convert", tiny_base(), at_once, *SPEC, "--mlx")
    assert "MLX      mlx-lm will load it, with --trust-remote-code" in done.stdout
    run("convert", tiny_base(), later, *SPEC)
    assert run("mlx", later).exit_code == 0
    assert tree(at_once) == tree(later)
    values = json.loads(run("convert", tiny_base(), tmp_path / "three", *SPEC, "--mlx", "--json", "--dry-run").stdout)
    assert values["mlx"] is True


def test_restore_gives_the_base_and_push_sends_the_code(export, tiny_base, tmp_path):
    loopexport.plan_mlx(export).apply()
    assert set(allowed_files(loopexport.open_export(export)).small) >= CODE
    loopexport.restore(export, tmp_path / "base")
    assert config_of(tmp_path / "base") == config_of(tiny_base())


def test_transformers_keeps_it_and_training_too(export, tmp_path):
    loopexport.plan_mlx(export).apply()
    AutoConfig.from_pretrained(export, trust_remote_code=True).save_pretrained(tmp_path / "config")
    assert config_of(tmp_path / "config")["model_file"] == MODEL_FILE
    tuned = save_trained(export, tmp_path / "tuned")
    assert set(tree(tuned)) >= CODE
    adopted = loopexport.adopt(tuned)
    assert adopted.runs_on_mlx
    assert "### MLX" in (tuned / "README.md").read_text()
    assert "model_file" not in json.loads((tuned / "base" / "config.json").read_text())
    assert checks(tuned, "--files-only")[1] == 0


def test_code_of_the_base_for_mlx_is_left_behind(tiny_base, tmp_path):
    base = shutil.copytree(tiny_base(), tmp_path / "base")
    edit_config(base, model_file="theirs.py")
    export = loopexport.convert(str(base), tmp_path / "looped", span=SPAN, steps=3).root
    assert "model_file" not in config_of(export)
    assert config_of(export / "base")["model_file"] == "theirs.py"
    assert checks(export, "--files-only")[1] == 0


def test_another_model_file_is_foreign_code(export, tmp_path):
    edit_config(export, model_file="../other.py")
    failed = checks(export, "--files-only")[0]["config is the base's plus the loop"]
    assert failed["detail"] == "config.json differs from the base's in model_file"
    assert_refused(tmp_path, "mlx", export, says="the model_file of config.json in")


REFUSED = {
    "kv reference depends on where the prompt ended": {"kv": "reference"},
    "set loop_kv to shared, and loop_rule to another than aitken": {"kv": "reference", "rule": "aitken", "steps": 4},
    "decode bypass has to know which tokens are generated": {"decode": "bypass"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_loop_that_mlx_does_not_run_is_refused_by_name(export_dir, tiny_base, tmp_path, message):
    export = shutil.copytree(export_dir(**REFUSED[message]), tmp_path / "looped")
    assert_refused(tmp_path, "mlx", export, says=message)
    options = [each for name, value in REFUSED[message].items() for each in (f"--{name}", value) if name != "steps"]
    steps = str(REFUSED[message].get("steps", 3))
    command = ["convert", tiny_base(), tmp_path / "out", "--span", "1:4", "--steps", steps, *options, "--mlx"]
    assert_refused(tmp_path, *command, says=message.replace("loop_", "--"))
    assert_refused(tmp_path, "verify", export, "--runtime", "mlx", says=message)


def test_one_step_runs_under_any_policy(export_dir, tmp_path):
    export = shutil.copytree(export_dir(kv="reference", steps=1), tmp_path / "looped")
    assert not loopexport.plan_mlx(export).is_current


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("qwen4_exp_text", "family qwen4_exp_text was not compared in MLX; use transformers"),
        ("jamba", "family jamba gives other logits in mlx-lm than in transformers, without a loop too"),
        ("qwen3_next", "family qwen3_next remembers more than keys and values, which kv shared cannot hand on"),
    ],
)
def test_families_are_refused_by_name(family, message):
    spec = LoopSpec(span=SPAN, steps=2)
    assert mlx_refusal({"model_type": family}, spec, 6).startswith(message)


def test_families_with_recurrent_layers_run_under_per_step():
    assert mlx_refusal({"model_type": "qwen3_next"}, LoopSpec(span=SPAN, steps=2, kv="per_step"), 6) is None
    assert mlx_refusal({"model_type": "llama"}, LoopSpec(span=SPAN, steps=2), 6) is None


@pytest.mark.parametrize(("family", "fields", "message"), NOT_READ)
def test_configs_that_mlx_lm_does_not_read_are_refused_by_name(family, fields, message):
    reason = mlx_refusal({"model_type": family, **fields}, LoopSpec(span=SPAN, steps=2), 6)
    assert message in reason
    assert reason.endswith("; use transformers")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (((0, 4), (8, 10)), "layers 4 to 7, whose caches would stay empty, and mlx-lm's batches need them"),
        (((0, 4), (5, 10)), "layer 4, whose cache would stay empty, and mlx-lm's batches need it"),
        (((0, 4), (5, 8), (9, 10)), "layers 4 and 8, whose caches"),
    ],
)
def test_all_layers_that_a_path_leaves_out_are_named(path, text):
    assert f"the path leaves out {text}" in mlx_loop_refusal(LoopSpec(span=None, path=path, steps=2), 10)


def test_a_config_of_transformers_5_is_read_by_its_names_of_transformers_4():
    scaled = rope("linear", 1e6, factor=8.0)
    kinds = {"rope_parameters": {SLIDING: rope(rope_theta=3e4), FULL: scaled}, "layer_types": THIRD}
    assert mlx_config_fields("gemma3_text", kinds) == {
        "rope_theta": 1e6,
        "rope_scaling": {**scaled, "type": "linear"},
        "rope_local_base_freq": 3e4,
        "sliding_window_pattern": 3,
    }
    part = {"rope_parameters": rope(partial_rotary_factor=0.5)}
    assert mlx_config_fields("gpt_neox", part) == {"rotary_emb_base": 1e5, "rotary_pct": 0.5, "rope_scaling": None}
    assert mlx_config_fields("exaone4", {"sliding_window_pattern": 4, "sliding_window": 8}) == {
        "sliding_window_pattern": "LLLG"
    }
    assert mlx_config_fields("llama", {"rope_theta": 5e5, "rope_scaling": YARN}) == {}


WINDOW = {"sliding_window": 8, "max_position_embeddings": 128}
NOTED = "mlx-lm's {} leaves out the sliding window of 8 tokens, so on longer texts its logits differ from those of"


@pytest.mark.parametrize("family", ["gemma2", "mistral", "phi3", "dots1", "starcoder2", "qwen3_moe"])
def test_a_sliding_window_that_mlx_lm_leaves_out_is_noted(family):
    [note] = mlx_warnings({"model_type": family, "use_sliding_window": True, **WINDOW})
    assert note.startswith(NOTED.format(family))


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("gemma3_text", {}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 128}),
        ("qwen2", {}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 6, "num_hidden_layers": 6}),
        ("gemma2", {"layer_types": [FULL] * 6}),
    ],
)
def test_a_window_that_is_not_left_out_or_not_used_is_not_noted(family, fields):
    assert mlx_warnings({"model_type": family, **WINDOW, **fields}) == []


def test_other_roundings_of_a_rotary_embedding_are_noted():
    [note] = mlx_warnings({"model_type": "phi3", "rope_scaling": {"type": "longrope"}})
    assert "long factors" in note
    [note] = mlx_warnings({"model_type": "gpt_oss", "rope_parameters": {**YARN, "truncate": False}})
    assert "rounds the bounds of YaRN" in note


def test_both_commands_print_the_notes(tiny_base, tmp_path):
    note = f"Note     {NOTED.format('mistral')}"
    command = ["convert", tiny_base("mistral"), tmp_path / "out", *SPEC]
    assert note not in run(*command, "--dry-run").stdout
    assert note in run(*command, "--mlx").stdout
    assert note in run("mlx", tmp_path / "out").stdout
    assert json.loads(run("mlx", tmp_path / "out", "--json").stdout)["warnings"][0].startswith(NOTED.format("mistral"))
    assert json.loads(run("inspect", tmp_path / "out", "--json").stdout)["notices"][-1].startswith(
        NOTED.format("mistral")
    )


def test_weights_that_mlx_does_not_read_are_refused_by_name(tiny_base, tmp_path):
    plan = loopexport.plan_convert(str(tiny_base()), tmp_path / "out", span=SPAN, steps=2)
    reason = why_not_on_mlx(plan.base, ("model.safetensors", "weights.safetensors"), plan.spec)
    assert reason.startswith("it reads only weights called model*.safetensors, not weights.safetensors")


def test_earlier_code_has_to_be_upgraded_first(tmp_path):
    root = earlier_export("nine-files", tmp_path / "earlier")
    assert_refused(tmp_path, "mlx", root, says=f"run `loopexport upgrade {root}` first")


def test_verify_says_what_is_missing(export, tmp_path):
    assert_refused(tmp_path, "verify", export, "--runtime", "mlx", says=f"run `loopexport mlx {export}` first")
    loopexport.plan_mlx(export).apply()
    assert_refused(tmp_path, "verify", export, "--runtime", "mlx", says="mlx-lm is not installed for")
    assert_refused(
        tmp_path, "verify", export, "--runtime", "mlx", "--files-only", says="--runtime mlx needs it", status=2
    )


@pytest.fixture
def ran_as(export, monkeypatch):
    """`ran_as(looped, base)`: `check_mlx` if MLX computes logits that are off by these fractions of the scale."""
    loopexport.plan_mlx(export).apply()

    def pretend(looped, base):
        monkeypatch.setattr(checks_mlx, "_logits", lambda model, probe, steps=None: scaled)
        monkeypatch.setattr(checks_mlx, "run_mlx", lambda runs, python: [ran(looped), ran(base)])
        return check_mlx(loopexport.open_export(export), python="elsewhere")

    scaled = np.ones((1, 2, 3), np.float32)

    def ran(off):
        return Ran(scaled * (1 + off), scaled * (1 + off), "settings", "")

    return pretend


@pytest.mark.parametrize(
    ("looped", "base", "passed"), [(1e-6, 1e-6, True), (1e-4, 1e-6, False), (1e-4, 5e-5, None), (1e-2, 1e-4, False)]
)
def test_a_loop_is_held_to_what_the_base_is(ran_as, looped, base, passed):
    assert [check.passed for check in ran_as(looped, base)] == [passed, passed]


def test_a_process_that_dies_is_told_for_every_run(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho out of luck\nexit 3\n")
    python.chmod(0o755)
    errors = [ran.error for ran in checks_mlx.run_mlx([{}, {}], python=str(python))]
    assert errors == ["mlx-lm's process ended with status 3: out of luck"] * 2


def test_releases_are_compared_by_number():
    assert [is_too_old(each) for each in ("0.31.3", "0.9.0", "0.32.0", "0.32.2", "0.100.0", "1.0.0rc1")] == [
        *(True, True),
        *(False,) * 4,
    ]
