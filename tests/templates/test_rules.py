"""Update rules, several spans, frozen routing and norm interpolation: each against the hand-written oracle."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

import loopexport
from loopexport import templates
from loopexport.cli.commands import main
from loopexport.loop.spec import KV_POLICIES, MODES, RULES
from loopexport.templates.looped_rules import UPDATES as TEMPLATE_UPDATES
from loopexport.templates.looped_spec import UNSTABLE_RULES
from support.compare import assert_bitwise, assert_close, assert_differs
from support.forwards import LENGTH, check_against_oracle, full_forward
from support.oracle import UPDATES, Oracle
from support.paths import ROOT
from support.rule_values import STEPS, VALUES
from support.structure import by_class
from support.tiny import FAMILIES, MOE_FAMILIES, SPAN, tiny_tokens

OTHER_VALUES = {
    "euler": {"damping": 0.4},
    "ema": {"damping": 0.3},
    "midpoint": {"damping": 0.2},
    "heun": {"damping": 0.2},
    "rk4": {"damping": 0.2},
    "heavy_ball": {"damping": 0.4, "momentum": 0.6},
    "anderson": {"damping": 0.7, "history": 3},
    "norm_stab": {"damping": 0.8},
    "input_anchor": {"damping": 0.7},
}


def policies(rule):
    return ["reference"] if rule in UNSTABLE_RULES else KV_POLICIES


def test_rules_are_declared_and_computed_under_the_same_names():
    assert list(RULES) == list(TEMPLATE_UPDATES)
    assert set(RULES) == set(UPDATES)


@pytest.mark.parametrize(("rule", "kv"), [(rule, kv) for rule in RULES for kv in policies(rule)])
def test_every_rule_and_policy_equals_the_oracle(looped, plain, rule, kv):
    spec = {"span": SPAN, "steps": STEPS, "rule": rule, "kv": kv, **VALUES.get(rule, {})}
    check_against_oracle(looped("llama", **spec), plain("llama"), spec)


@pytest.mark.parametrize("rule", OTHER_VALUES)
def test_every_rule_takes_its_values(looped, plain, rule):
    spec = {"span": SPAN, "steps": STEPS, "rule": rule, "kv": "reference", "anchor": 0.3, **OTHER_VALUES[rule]}
    check_against_oracle(looped("llama", **spec), plain("llama"), spec)
    default = {**spec, "anchor": 0.0} | dict.fromkeys(OTHER_VALUES[rule])
    tokens = tiny_tokens(2, LENGTH)
    assert_differs(
        full_forward(looped("llama", **{**spec, "anchor": 0.0}), tokens),
        full_forward(looped("llama", **default), tokens),
    )


@pytest.mark.matrix
@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_moe", "deepseek_v3", "gpt2"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", RULES)
def test_matrix_of_rules_modes_and_families_equals_the_oracle(looped, plain, rule, mode, family):
    spec = {"span": SPAN, "steps": STEPS, "rule": rule, "mode": mode, **VALUES.get(rule, {})}
    spec["kv"] = policies(rule)[-1]
    check_against_oracle(looped(family, **spec), plain(family), spec)


@pytest.mark.parametrize("rule", RULES)
def test_one_step_is_the_base_model_under_every_rule(looped, plain, rule):
    spec = {"steps": 1, "rule": rule, "kv": policies(rule)[-1]}
    tokens = tiny_tokens(2, LENGTH)
    assert_bitwise(full_forward(looped("llama", **spec), tokens), full_forward(plain("llama"), tokens))


@pytest.mark.parametrize("rule", RULES)
def test_cost_counts_the_evaluations_that_are_run(looped, tiny_base, rule):
    spec = {"span": SPAN, "steps": STEPS, "rule": rule, "kv": policies(rule)[-1], **VALUES.get(rule, {})}
    model, runs = looped("llama", **spec), []
    for layer in model.model.layers._modules.values():
        layer.register_forward_hook(lambda *_: runs.append(1))
    full_forward(model, tiny_tokens(1, 5))
    assert loopexport.plan_convert(str(tiny_base("llama")), **spec).cost.layer_evaluations == len(runs)


@pytest.mark.parametrize("kv", KV_POLICIES)
@pytest.mark.parametrize("mode", MODES)
def test_several_spans_equal_the_oracle(looped, plain, kv, mode):
    spec = {"span": ((0, 2), (2, 3), (4, 6)), "steps": 3, "anchor": 0.25, "kv": kv, "mode": mode}
    check_against_oracle(looped("llama", **spec), plain("llama"), {**spec, "span": list(spec["span"])})


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("mode", MODES)
def test_norm_interpolation_equals_the_oracle(looped, plain, family, mode):
    spec = {"span": SPAN, "steps": 3, "anchor": 0.5, "mode": mode, "norm_interpolation": True}
    check_against_oracle(looped(family, **spec), plain(family), spec)
    tokens = tiny_tokens(2, LENGTH)
    without = looped(family, **{**spec, "norm_interpolation": False})
    assert_differs(full_forward(looped(family, **spec), tokens), full_forward(without, tokens))


@pytest.mark.parametrize("kv", KV_POLICIES)
@pytest.mark.parametrize("family", by_class(MOE_FAMILIES))
def test_frozen_routing_equals_the_oracle(looped, plain, family, kv):
    """With all that the authors' `layer_anchored_frozen` does."""
    spec = {
        "span": SPAN,
        "steps": 4,
        "anchor": 0.5,
        "mode": "layer",
        "frozen_routing": True,
        "norm_interpolation": True,
        "kv": kv,
    }
    check_against_oracle(looped(family, **spec), plain(family), spec)
    tokens = tiny_tokens(2, LENGTH)
    free = looped(family, **{**spec, "frozen_routing": False})
    assert_differs(full_forward(looped(family, **spec), tokens), full_forward(free, tokens))


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_frozen_routing_in_block_mode_equals_the_oracle(looped, plain, family):
    spec = {"span": SPAN, "steps": 3, "frozen_routing": True}
    check_against_oracle(looped(family, **spec), plain(family), spec)


def test_frozen_routing_changes_nothing_in_a_dense_model(looped):
    tokens = tiny_tokens(2, LENGTH)
    frozen, free = looped("llama", frozen_routing=True), looped("llama")
    assert_bitwise(full_forward(frozen, tokens), full_forward(free, tokens))


def test_frozen_routing_leaves_no_state_behind(looped, plain):
    model, tokens = looped("qwen3_moe", frozen_routing=True), tiny_tokens(2, LENGTH)
    first = full_forward(model, tokens)
    full_forward(model, tiny_tokens(1, 3, seed=5))
    assert_bitwise(full_forward(model, tokens), first)
    model.config.loop_steps = 1
    assert_bitwise(full_forward(model, tokens), full_forward(plain("qwen3_moe"), tokens))


def test_frozen_routing_refuses_gradient_checkpointing(looped):
    model = looped("qwen3_moe", frozen_routing=True)
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(ValueError, match="frozen routing does not work with gradient checkpointing"):
        model(tiny_tokens(1, 5))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"rule": "nope"}, "rule 'nope' must be one of euler, residual_scaled"),
        ({"rule": "aitken", "steps": 3}, "steps 3 must be even for rule aitken"),
        ({"rule": "aitken", "damping": 0.5}, "rule aitken does not use damping"),
        ({"rule": "ema_sched"}, "rule ema_sched needs a schedule of 4 numbers (steps), not none"),
        ({"rule": "ema_sched", "schedule": [0.5]}, "needs a schedule of 4 numbers (steps), not 1"),
        ({"rule": "ema_sched", "schedule": "a,b"}, "schedule 'a,b' is not a list of numbers"),
        ({"rule": "poly_blend", "schedule": [0.5] * 5}, "must sum to 1, not 2.5"),
        ({"rule": "anderson", "kv": "shared"}, "use kv reference"),
        ({"rule": "aitken", "steps": 4, "kv": "per_step"}, "so rounding decides between two steps"),
        ({"rule": "anderson", "kv": "reference", "history": 0}, "history 0 must be a whole number from 1"),
        ({"rule": "heavy_ball", "momentum": 1}, "momentum 1 must be a number in [0, 1)"),
        ({"momentum": 0.5}, "rule euler does not use momentum"),
        ({"rule": "rk4", "norm_interpolation": True}, "rule rk4 does not use norm_interpolation"),
        ({"frozen_routing": "yes"}, "frozen_routing 'yes' must be true or false"),
        ({"span": [(1, 3), (2, 5)]}, "spans 1:3 and 2:5 overlap or are out of order"),
        ({"span": ["3:5", "1:2"]}, "spans 3:5 and 1:2 overlap or are out of order"),
        ({"span": [(1, 3), (4, 9)]}, "span 4:9 ends outside the model, which has 6 layers"),
    ],
)
def test_impossible_rules_are_refused(tiny_base, spec, says):
    with pytest.raises(loopexport.LoopExportError) as refused:
        loopexport.plan_convert(str(tiny_base()), **{"span": SPAN, "steps": STEPS, **spec})
    assert says in str(refused.value)


def test_span_option_may_be_repeated(tiny_base, tmp_path):
    command = ["convert", str(tiny_base()), str(tmp_path / "out"), "--span", "0:2", "--span", "3:4", "--steps", "3"]
    assert CliRunner().invoke(main, command).exit_code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["loop_span"] == [[0, 2], [3, 4]]
    assert loopexport.open_export(tmp_path / "out").spec.layers == (0, 1, 3)


def test_spec_file_may_name_several_spans_and_a_rule(tiny_base, tmp_path):
    (tmp_path / "loop.yaml").write_text("span: [0:2, 3:4]\nsteps: 2\nrule: ema_sched\nschedule: [0.5, 0.25]\n")
    command = ["convert", str(tiny_base()), str(tmp_path / "out"), "--spec", str(tmp_path / "loop.yaml")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    spec = loopexport.open_export(tmp_path / "out").spec
    assert (spec.spans, spec.schedule) == (((0, 2), (3, 4)), (0.5, 0.25))


def test_rules_are_listed():
    listed = json.loads(CliRunner().invoke(main, ["rules", "--json"]).stdout)
    assert list(listed) == list(RULES)
    text = CliRunner().invoke(main, ["rules"]).stdout
    assert all(name in text for name in RULES)


def test_changing_the_rule_at_run_time_takes_effect(looped, plain):
    model, tokens = looped("llama", steps=4), tiny_tokens(2, LENGTH)
    model.config.loop_rule = "rk4"
    with torch.no_grad():
        theirs = Oracle(plain("llama"), SPAN, 4, rule="rk4").logits(tokens, [LENGTH])
    assert_close(full_forward(model, tokens), theirs)
    with pytest.raises(ValueError, match="must be one of"):
        model.config.loop_rule = "nope"


def test_every_file_of_the_templates_goes_into_an_export():
    here = {path.name for path in (ROOT / "templates").glob("*.py")}
    assert here - {"__init__.py"} == set(templates.FILES)
    assert set(MOE_FAMILIES) < set(FAMILIES)
