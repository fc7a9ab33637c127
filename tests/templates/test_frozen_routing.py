"""Frozen routing: what experts are given in an iteration is what they were given in the natural pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import loopexport
from loopexport.base import families
from support.family_walk import RELEASE, save_tiny_family
from support.tiny import MOE_FAMILIES, tiny_tokens
from support.watch_experts import LENGTH, STEPS, load, run_and_compare, sparse_export, watch_experts


def has_experts(family: str) -> bool:
    """Whether the source of a family's native model speaks of experts that are routed to."""
    directory = Path(transformers.__file__).parent / "models" / model_type_to_module_name(family).replace(".", "/")
    source = "".join(path.read_text() for path in directory.glob("modeling_*.py"))
    return any(f"self.{name} = " in source for name in ("experts", "router", "router_gate"))


# A multimodal family has the experts of its text family.
MULTIMODAL_FAMILIES = [family for family, outcomes in families.outcomes().items() if families.READS in outcomes]
SPARSE_FAMILIES = [
    family for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if family not in MULTIMODAL_FAMILIES and has_experts(family)
]


def scatter_biases(model) -> None:
    """Give the biases by which some routers choose, and do not weigh, values that matter."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "correction_bias" in name or "balancing_biases" in name or "expert_bias" in name:
            torch.nn.init.normal_(tensor, std=0.1)


def freezes(family, directory) -> str:
    """Empty where frozen routing is exact for a family; why it is refused, where it is.

    Raises:
        AssertionError: experts are given something else in an iteration, or the test sees no difference at all.
    """
    try:
        out, span = sparse_export(family, directory, frozen_routing=True)
    except ValueError as refusal:
        return str(refusal)
    tokens = tiny_tokens(2, LENGTH)
    for frozen in (True, False):
        model = load(out, loop_frozen_routing=frozen)
        torch.manual_seed(0)
        scatter_biases(model)
        same, total = run_and_compare(model, span, tokens)
        assert total > 0, "no experts were seen to run again"
        assert (same == total) if frozen else (same < total), f"{same} of {total} runs are as in the natural pass"
    return ""


@pytest.mark.matrix
@pytest.mark.parametrize("family", SPARSE_FAMILIES)
def test_experts_get_the_same_tokens_and_weights_in_every_iteration_or_freezing_is_refused(family, tmp_path):
    status = families.outcomes().get(family, {}).get(RELEASE, "works").partition(":")[0]
    if status in ("refused", "untried", "no span"):
        pytest.skip(f"{family} cannot be looped at all: {status}")
    assert freezes(family, tmp_path) == ""


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_experts_get_the_same_tokens_and_weights_in_layer_mode_and_with_a_cache(export_dir, family):
    """In the prefill, in a decode step, and under a rule of several evaluations a step."""
    fields = {"mode": "layer", "frozen_routing": True, "norm_interpolation": True, "kv": "reference"}
    model, tokens = load(export_dir(family, steps=STEPS, **fields)), tiny_tokens(2, LENGTH)
    scatter_biases(model)
    watched = watch_experts(model)
    with torch.no_grad():
        cache = model(tokens[:, :-1], use_cache=True).past_key_values
        for runs in watched.values():
            runs.clear()
        model(tokens[:, -1:], past_key_values=cache)
    looped = [runs for runs in watched.values() if len(runs) == STEPS]
    assert looped
    for first, *later in looped:
        assert all(torch.equal(*pair) for run in later for pair in zip(run, first, strict=True))


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_experts_get_the_same_weights_in_training_with_jitter(tmp_path, noise):
    base = save_tiny_family("mixtral", tmp_path / "base", router_jitter_noise=noise)
    out = loopexport.convert(str(base), tmp_path / "out", span=(2, 4), steps=STEPS, frozen_routing=True).root
    model = load(out).train()
    assert run_and_compare(model, (2, 4), tiny_tokens(2, LENGTH)) == (4, 4)
