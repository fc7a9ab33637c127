"""`verify` compares a model with the loop by hand, and says so where it cannot."""

from __future__ import annotations

import inspect
import textwrap

import pytest
import torch
from transformers.models.llama import modeling_llama

import loopexport
from loopexport.checks.effect import CHANGES_LOGITS, LAYER_RUNS
from loopexport.checks.replay import CannotReplayError, looped_by_hand
from loopexport.checks.replay_rules import RULES as RULES_BY_HAND
from loopexport.checks.verification import CACHED_IS_BY_HAND, FULL_IS_BY_HAND, RUNS
from loopexport.loop.spec import RULES, make_spec
from loopexport.templates.looped_spec import UNSTABLE_RULES
from support.loaded_code import code_beside
from support.rule_values import STEPS, VALUES
from support.structure import by_class
from support.tiny import SPAN, tiny_model, tiny_tokens
from support.watch_experts import load

BY_HAND = (FULL_IS_BY_HAND, CACHED_IS_BY_HAND)


def outcome(root) -> dict:
    """The checks of `verify`, by name."""
    return {check.name: check for check in loopexport.verify(root)}


def assert_is_by_hand(root):
    """Both comparisons with the loop by hand have to be made, and to hold."""
    checks = outcome(root)
    for name in BY_HAND:
        assert checks[name].passed, checks[name]
    assert checks[LAYER_RUNS].passed
    assert checks[CHANGES_LOGITS].passed


@pytest.mark.parametrize("kv", ["shared", "per_step", "reference"])
@pytest.mark.parametrize(
    "spec",
    [
        {"mode": "block", "decode": "bypass", "span": ((0, 2), (3, 6))},
        {"mode": "layer", "decode": "first_n", "first_n": 1, "anchor": 0.3},
        {"mode": "layer", "span": ((0, 1), (2, 4))},
    ],
    ids=["blocks", "layers", "spans"],
)
def test_every_policy_is_computed_by_hand(export_dir, kv, spec):
    assert_is_by_hand(export_dir("mistral", kv=kv, **spec))


@pytest.mark.parametrize("rule", by_class(RULES, ("rk4", "heavy_ball", "anderson", "uniform")))
def test_every_rule_is_computed_by_hand(export_dir, rule):
    spec = {"kv": "reference"} if rule in UNSTABLE_RULES else {}
    assert_is_by_hand(export_dir("llama", rule=rule, steps=STEPS, **VALUES.get(rule, {}), **spec))


def test_rules_by_hand_are_all_rules():
    assert RULES_BY_HAND.keys() == RULES.keys()


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_frozen_routing_is_computed_by_hand(export_dir, family):
    assert_is_by_hand(export_dir(family, mode="layer", frozen_routing=True, norm_interpolation=True, anchor=0.5))


@pytest.mark.parametrize(("spec", "why"), [({"steps": 1}, "steps 1, anchor 0"), ({"anchor": 1.0}, "steps 3, anchor 1")])
def test_identity_has_no_effect_and_says_so(export_dir, spec, why):
    checks = outcome(export_dir("llama", **spec))
    assert (checks[CHANGES_LOGITS].passed, checks[CHANGES_LOGITS].difference) == (None, 0)
    assert f"does not apply: {why} is the base model" in checks[CHANGES_LOGITS].detail
    assert all(checks[name].passed for name in (*BY_HAND, LAYER_RUNS))


def test_loop_too_weak_to_show_is_no_failure(export_dir):
    """An anchor so near 1 that both the model and the loop by hand give the base's logits."""
    checks = outcome(export_dir("llama", anchor=1 - 1e-12))
    assert checks[CHANGES_LOGITS].passed is not False, checks[CHANGES_LOGITS]
    assert all(checks[name].passed for name in BY_HAND)


def walk_past_the_list(monkeypatch):
    """Let Llama find its layers by another way than its layer list, as a later release of transformers may."""
    source = textwrap.dedent(inspect.getsource(modeling_llama.LlamaModel.forward))
    walk = next(line for line in source.splitlines() if " in self.layers" in line)
    past = walk.partition("for ")[0] + "for decoder_layer in self._modules['layers'].children():"
    names: dict = {}
    body = source[source.index("def forward") :].replace(walk, past)
    exec(compile(body, "llama", "exec"), {**vars(modeling_llama)}, names)
    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", names["forward"])


def test_model_that_does_not_loop_fails(export_dir, monkeypatch):
    walk_past_the_list(monkeypatch)
    check = outcome(export_dir("llama", damping=1.0))[RUNS]
    assert check.passed is False
    assert "did not run layer 1 through its layer list" in check.detail


def test_model_that_gives_its_native_layers_fails(export_dir, monkeypatch):
    """Where the loop's own alarm is broken too."""
    walk_past_the_list(monkeypatch)
    root = export_dir("llama", damping=1.0)
    monkeypatch.setattr(code_beside(load(root), "looped_walk").Walk, "check_complete", lambda self, decoder: None)
    checks = outcome(root)
    assert [name for name in (LAYER_RUNS, CHANGES_LOGITS, *BY_HAND) if checks[name].passed is not False] == []
    assert checks[LAYER_RUNS].detail == "layer 1 runs 1 times, not 3"


def replay_on(model, **spec):
    """One full forward of the loop by hand."""
    with torch.no_grad(), looped_by_hand(model, make_spec(span=SPAN, steps=3, **spec)):
        return model(tiny_tokens(1, 5), use_cache=True).logits


def count_calls(layer):
    """Let a layer's output depend on how often it ran."""
    calls = []
    layer.register_forward_hook(lambda module, args, output: calls.append(1) or output * len(calls))


def without_cache(layer):
    """Keep the K/V cache from a layer."""
    drop = dict.fromkeys(("cache", "past_key_values", "past_key_value"))
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {key: drop.get(key, each) for key, each in kwargs.items()}),
        with_kwargs=True,
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (count_calls, "layer 2 depends on more than its arguments and its keys and values"),
        (without_cache, "layer 2 gets no K/V cache"),
    ],
    ids=["hidden state", "no cache"],
)
def test_layers_that_keep_other_state_cannot_be_replayed(change, says):
    model = tiny_model("llama")
    change(model.model.layers[2])
    with pytest.raises(CannotReplayError, match=says):
        replay_on(model)
    assert not model.model.layers[1]._forward_hooks, "hooks are removed"


def test_experts_without_a_router_cannot_be_frozen_by_hand():
    model = tiny_model("qwen3_moe")
    block = model.model.layers[1].mlp
    block.chooser = block._modules.pop("gate")
    with pytest.raises(CannotReplayError, match="has experts, but no module named router or gate"):
        replay_on(model, frozen_routing=True)


def test_what_cannot_be_replayed_is_not_passed_silently(export_dir, monkeypatch):
    def refuse(model, spec):
        raise CannotReplayError("layer 2 depends on the weather")

    monkeypatch.setattr("loopexport.checks.replay.looped_by_hand", refuse)
    checks = outcome(export_dir("llama"))
    for name in BY_HAND:
        assert checks[name].passed is None
        assert checks[name].detail == (
            "not checked: the loop cannot be computed by hand here (layer 2 depends on the weather)"
        )
    assert checks[LAYER_RUNS].passed
