"""Published cells, the span heuristic, and what `convert` says about gains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import loopexport
from loopexport.loop.presets import PRESETS, STATUSES, find_preset
from loopexport.templates.looped_fit import check_depth
from support.checkpoints import write_sparse_checkpoint
from support.commands import run

# The cells again, from their sources: span, K, s, beta, mode, decode, frozen routing, norm interpolation.
CELLS = {
    "qwen3-4b-mmlu-pro": ((15, 19), 3, 1 / 3, 0, "block", "full", False, False),
    "qwen3-4b-base-16-tasks": ((15, 19), 6, 1 / 6, 0.5, "block", "bypass", False, False),
    "qwen3-30b-a3b-16-tasks": ((22, 26), 6, 1 / 6, 0.5, "block", "bypass", False, False),
    "qwen3-30b-a3b-aime26": ((29, 33), 6, 1 / 6, 0.5, "layer", "full", True, True),
    "qwen3-30b-a3b-aime26-t2": ((29, 34), 6, 1 / 3, 0.5, "layer", "full", True, True),
    "qwen3-30b-a3b-aime26-t2-no-norm": ((29, 34), 6, 1 / 3, 0.5, "layer", "full", True, False),
    "qwen3-30b-a3b-aime26-t2-narrow": ((29, 33), 6, 1 / 3, 0.5, "layer", "full", True, True),
    "qwen3-30b-a3b-aime26-t2.5": ((29, 34), 6, 2.5 / 6, 0.5, "layer", "full", True, True),
    "qwen3-30b-a3b-aime26-t4": ((29, 33), 12, 1 / 3, 0.5, "layer", "full", True, True),
    "qwen3-1.7b-base-16-tasks": ((12, 16), 2, 1 / 2, 0, "block", "full", False, False),
    "gpt-oss-20b-aime26": ((14, 16), 6, 1 / 6, 0.5, "layer", "full", True, True),
    "ernie-4.5-21b-a3b-aime26": ((17, 19), 6, 1 / 6, 0.5, "layer", "full", True, True),
    "kimi-vl-a3b-aime26": ((16, 18), 6, 1 / 6, 0.5, "layer", "full", True, True),
    "kimi-vl-a3b-truncation": ((8, 10), 6, 1 / 6, 0.5, "layer", "full", True, True),
}
GAINS = {
    "qwen3-4b-mmlu-pro": [2.64, 1.05],
    "qwen3-4b-base-16-tasks": [None],
    "qwen3-30b-a3b-16-tasks": [None],
    "qwen3-30b-a3b-aime26": [1.42, 0.35, 0.22],
    "qwen3-30b-a3b-aime26-t2": [2.79],
    "qwen3-30b-a3b-aime26-t2-no-norm": [2.81],
    "qwen3-30b-a3b-aime26-t2-narrow": [2.43],
    "qwen3-30b-a3b-aime26-t2.5": [2.79],
    "qwen3-30b-a3b-aime26-t4": [-7.9],
    "qwen3-1.7b-base-16-tasks": [0.55, None],
    "moonlight-16b-a3b-openbookqa": [1.20],
    "gpt-oss-20b-aime26": [-1.15],
    "ernie-4.5-21b-a3b-aime26": [-2.29],
    "kimi-vl-a3b-aime26": [-0.52],
    "kimi-vl-a3b-truncation": [None],
}
RECIPES = {preset.name: preset.evaluation for preset in PRESETS if preset.evaluation}


@pytest.fixture
def make_base(tmp_path):
    """`make_base(name, model_type, layers, **config)`: a checkpoint of zeros that takes no disk."""

    def make(name="base", model_type="llama", layers=36, shard_bytes=40_000, **config):
        root = write_sparse_checkpoint(tmp_path / name, 1, shard_bytes, layers_per_shard=layers)
        values = json.loads((root / "config.json").read_text())
        (root / "config.json").write_text(json.dumps({**values, "model_type": model_type, **config}))
        return root

    return make


def warnings(base, **options):
    return " | ".join(loopexport.plan_convert(str(base), **options).warnings)


@pytest.mark.parametrize("name", CELLS)
def test_presets_are_the_published_cells(name):
    spec = find_preset(name).spec
    fields = spec.span, spec.steps, spec.step_size, spec.anchor, spec.mode, spec.decode
    assert (*fields, spec.frozen_routing, spec.norm_interpolation) == CELLS[name]
    assert (spec.kv, spec.rule) == ("reference", "euler")
    check_depth(spec, find_preset(name).num_layers)


def test_presets_hold_the_published_gains_and_losses():
    assert {preset.name: [result.gain for result in preset.results] for preset in PRESETS} == GAINS
    for preset in PRESETS:
        assert preset.status in STATUSES
        assert (preset.status == "negative") == any((result.gain or 0) < 0 for result in preset.results)
        for result in preset.results:
            assert result.interval is None or result.interval[0] < result.gain < result.interval[1]


def test_preset_on_its_own_model_says_what_was_published(make_base, tmp_path):
    base = make_base("gpt-oss-20b", "gpt_oss", 24, num_local_experts=32)
    result = run("convert", base, tmp_path / "out", "--preset", "gpt-oss-20b-aime26")
    assert (
        "published for this model and loop (negative): AIME26, two seeds: -1.15 points, 95 % CI [-3.56, +1.27]"
        in result.stdout
    )
    assert "unproven" not in result.stdout
    assert loopexport.open_export(tmp_path / "out").spec == find_preset("gpt-oss-20b-aime26").spec
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Published for this model and loop, negative" in card
    assert "-1.15 points" in card
    assert "No measured gain" not in card


def test_cell_of_third_parties_is_no_claim(make_base, tmp_path):
    base = make_base("Qwen3-1.7B-Base", "qwen3", 28)
    result = run("convert", base, tmp_path / "out", "--preset", "qwen3-1.7b-base-16-tasks")
    assert "unproven" in result.stdout
    assert "published" not in result.stdout
    card = (tmp_path / "out" / "README.md").read_text()
    assert "No measured gain is known" in card
    assert "0.55" not in card


def test_the_same_loop_by_flags_is_the_published_cell_too(make_base):
    base = make_base("Qwen3-4B-Instruct-2507", "qwen3", 36)
    said = warnings(base, span="15:19", steps=3, kv="reference")
    assert (
        "published for this model and loop (replicated): MMLU-Pro, 5-shot CoT, Qwen3-4B-Instruct: +2.64 points" in said
    )
    assert "Qwen3-4B-Instruct-2507: +1.05 points" in said


def test_another_model_of_the_same_kind_is_unproven(make_base):
    """Moonlight and the language model of Kimi-VL are of one family and depth."""
    said = warnings(make_base("Moonlight-16B-A3B-Instruct", "deepseek_v3", 27), preset="kimi-vl-a3b-aime26")
    assert "unproven" in said
    assert "published" not in said


def test_preset_on_another_kind_of_model_warns_and_scales_nothing(make_base):
    base = make_base("other", "llama", 40)
    plan = loopexport.plan_convert(str(base), preset="qwen3-4b-mmlu-pro")
    assert plan.spec.span == (15, 19)
    said = " | ".join(plan.warnings)
    assert (
        "was measured on qwen3 with 36 layers, but this base is llama with 40: its span 15:19 is used unscaled" in said
    )
    assert "unproven" in said
    assert "used unscaled" not in warnings(base, preset="qwen3-4b-mmlu-pro", span="17:21")


def test_span_of_a_preset_that_does_not_fit_is_told_with_what_to_do(make_base):
    small = str(make_base("small", "llama", 12))
    with pytest.raises(
        loopexport.LoopExportError, match="span 15:19 ends outside the model, which has 12 layers"
    ) as it:
        loopexport.plan_convert(small, preset="qwen3-4b-mmlu-pro")
    assert "of preset qwen3-4b-mmlu-pro, for qwen3 with 36 layers: give one for this model with --span" in str(it.value)
    assert loopexport.plan_convert(small, preset="qwen3-4b-mmlu-pro", span="5:9").spec.span == (5, 9)
    with pytest.raises(loopexport.LoopExportError, match="span 11:13 ends outside") as it:
        loopexport.plan_convert(small, preset="qwen3-4b-mmlu-pro", span="11:13")
    assert "preset" not in str(it.value)


@pytest.mark.parametrize(
    "changes", [{"kv": "shared"}, {"rule": "ema"}, {"decode": "bypass"}, {"damping": 1.0}], ids=str
)
def test_card_of_other_settings_claims_nothing_that_was_published(make_base, tmp_path, changes):
    base = make_base("Qwen3-4B-Instruct", "qwen3", 36)
    root = loopexport.convert(str(base), tmp_path / "out", preset="qwen3-4b-mmlu-pro", **changes).root
    card = (root / "README.md").read_text()
    assert "No measured gain is known" in card
    assert "MMLU" not in card


def test_changed_preset_is_no_longer_the_published_cell(make_base):
    base = make_base("Qwen3-4B-Instruct", "qwen3", 36)
    said = warnings(base, preset="qwen3-4b-mmlu-pro", kv="shared", anchor=0.5)
    assert "this loop differs from preset qwen3-4b-mmlu-pro in anchor, kv" in said
    assert "unproven" in said


def test_flags_and_spec_file_override_a_preset(make_base, tmp_path):
    base = make_base("Qwen3-30B-A3B", "qwen3_moe", 48, num_experts=128)
    (tmp_path / "loop.yaml").write_text("preset: qwen3-30b-a3b-aime26\nsteps: 4\n")
    options = ["--spec", tmp_path / "loop.yaml", "--no-frozen-routing", "--dry-run", "--json"]
    spec = json.loads(run("convert", base, "out", *options).stdout)["spec"]
    assert (spec["loop_span"], spec["loop_steps"], spec["loop_frozen_routing"]) == ([29, 33], 4, False)
    assert (spec["loop_mode"], spec["loop_norm_interpolation"]) == ("layer", True)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("qwen3-4b-mmlu", "did you mean qwen3-4b-mmlu-pro?"),
        ("gpt-oss", "did you mean gpt-oss-20b-aime26?"),
        ("nothing", "the presets are qwen3-4b-mmlu-pro, "),
        (
            "moonlight-16b-a3b-openbookqa",
            "span and steps were not published; leave --preset out, and give --span",
        ),
    ],
)
def test_unknown_and_unpublished_presets_are_refused(make_base, name, says):
    result = run("convert", make_base(), "out", "--preset", name)
    assert result.exit_code == 1
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


def test_presets_can_be_listed_and_shown():
    text = run("presets", "list").stdout
    assert all(preset.name in text and preset.status in text for preset in PRESETS)
    shown = run("presets", "show", "ernie-4.5-21b-a3b-aime26").stdout
    for part in (
        "negative",
        "ernie4_5_moe, 28 layers",
        "17:19, half-open",
        "6 steps",
        "-2.29 points",
        "[-5.80, +1.22]",
    ):
        assert part in shown
    values = json.loads(run("presets", "list", "--json").stdout)
    assert list(values) == [preset.name for preset in PRESETS]
    assert values["gpt-oss-20b-aime26"] == json.loads(run("presets", "show", "gpt-oss-20b-aime26", "--json").stdout)
    assert values["gpt-oss-20b-aime26"]["results"][0]["gain"] == -1.15
    assert values["moonlight-16b-a3b-openbookqa"]["spec"] is None


def metrics(config):
    """The metrics of a task or a group, from its YAML."""
    return {each["metric"] for each in config.get("metric_list") or config.get("aggregate_metric_list") or ()}


def test_every_task_of_a_recipe_is_one_of_the_harness():
    lm_eval = pytest.importorskip("lm_eval")
    index = pytest.importorskip("lm_eval.tasks._index")
    folders = [
        "arc",
        "commonsense_qa",
        "hellaswag",
        "lambada",
        "mmlu",
        "mmlu_pro",
        "openbookqa",
        "piqa",
        "sciq",
        "truthfulqa",
        "winogrande",
    ]
    known = index.TaskIndex.build([Path(lm_eval.__file__).parent / "tasks" / folder for folder in folders])
    for evaluation in RECIPES.values():
        assert set(evaluation.tasks) <= set(known)
        for name in evaluation.tasks:
            assert evaluation.metric.split(",")[0] in metrics(known[name].cfg), name


def test_recipes_ask_as_the_sources_did():
    asked = {
        name: (len(each.tasks), each.num_fewshot, each.chat_template, each.metric) for name, each in RECIPES.items()
    }
    assert asked == {
        "qwen3-4b-mmlu-pro": (1, 5, None, "exact_match,custom-extract"),
        "qwen3-4b-base-16-tasks": (16, 0, False, "acc"),
        "qwen3-30b-a3b-16-tasks": (16, 0, False, "acc"),
    }
    assert all(preset.spec for preset in PRESETS if preset.evaluation), "a recipe without a loop measures nothing"
    assert all(preset.protocol.text.isprintable() for preset in PRESETS)


def test_recipe_is_shown_with_its_command():
    name = "qwen3-4b-base-16-tasks"
    shown = run("presets", "show", name).stdout
    assert f"loopexport compare MODEL --preset {name} --out DIR" in shown
    assert "lambada_openai" in shown
    values = json.loads(run("presets", "show", name, "--json").stdout)
    assert values["evaluation"]["tasks"] == list(RECIPES[name].tasks)
    assert "metric of each task counts was not published" in values["protocol"]
    unknown = run("presets", "show", "gpt-oss-20b-aime26").stdout
    assert "math-ai/aime26" in unknown
    assert "loopexport compare" not in unknown
    assert json.loads(run("presets", "show", "gpt-oss-20b-aime26", "--json").stdout)["evaluation"] is None


def test_cost_factor_is_what_convert_counts(make_base):
    plan = loopexport.plan_convert(str(make_base("x", "qwen3", 36)), preset="qwen3-4b-base-16-tasks")
    assert find_preset("qwen3-4b-base-16-tasks").cost_factor == plan.cost.multiplier == 56 / 36
    assert find_preset("moonlight-16b-a3b-openbookqa").cost_factor is None


@pytest.mark.parametrize(
    ("layers", "config", "span"),
    [
        (36, {}, (15, 19)),
        (48, {"num_experts": 128}, (29, 33)),
        (24, {}, (9, 13)),
        (6, {}, (1, 5)),
        (3, {}, (0, 3)),
        (1, {}, (0, 1)),
    ],
)
def test_auto_span_lies_where_the_authors_found_theirs(make_base, layers, config, span):
    plan = loopexport.plan_convert(str(make_base(layers=layers, **config)), span="auto", steps=3)
    assert plan.spec.span == span
    assert plan.warnings[0].startswith(f"span auto is {span[0]}:{span[1]}, a heuristic: width")
    assert "other models lost with such spans" in plan.warnings[0]
    assert "unproven" in plan.warnings[1]


def test_auto_span_works_on_the_command_line(make_base):
    result = run("convert", make_base(), "out", "--span", "auto", "--steps", "3", "--dry-run")
    assert "15:19, half-open" in result.stdout
    assert "a heuristic" in result.stdout
    assert run("convert", make_base("b"), "out", "--span", "auto", "--steps", "0").exit_code == 1


@pytest.mark.parametrize(
    ("config", "options", "says"),
    [
        ({}, {"kv": "reference"}, "cached decoding differs from a full forward"),
        ({"num_experts": 8}, {}, "sparse experts without frozen routing"),
        ({}, {"frozen_routing": True}, "frozen routing changes nothing here"),
        ({}, {}, "models under 3B parameters gained nothing"),
        ({"model_type": "cpmant"}, {}, "family cpmant was not tested"),
    ],
)
def test_convert_warns(make_base, config, options, says):
    said = warnings(make_base(layers=6, **config), span="1:4", steps=3, **options)
    assert says in said


@pytest.mark.parametrize(
    ("config", "options", "unsaid"),
    [
        ({}, {}, "cached decoding"),
        ({"num_experts": 8}, {"frozen_routing": True}, "frozen routing"),
        ({}, {}, "experts"),
        ({}, {"steps": 1}, "unproven"),
        ({"shard_bytes": 8 * 10**9}, {}, "under 3B"),
    ],
)
def test_convert_does_not_warn_without_reason(make_base, config, options, unsaid):
    said = warnings(make_base(layers=6, **config), span="1:4", weights="hardlink", **{"steps": 3, **options})
    assert unsaid not in said
