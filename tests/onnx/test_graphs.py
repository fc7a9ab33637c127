"""ONNX graphs against the export in torch: every family, K, policy and rule, from one trace of each family."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import loopexport
import loopexport.onnx
from loopexport.base import families
from loopexport.onnx import OnnxModel
from loopexport.onnx.check.comparison import TOLERANCES, load_torch, make_scenarios, run_graph
from loopexport.onnx.trace.simplify import optimise
from loopexport.onnx.trace.substitutes import OnnxSubstitutes
from support.compare import LARGEST
from support.family_walk import RELEASE
from support.onnx_graphs import LONGROPE, LOOPS, MORE_LOOPS, QUICK_FAMILIES, assert_equals_torch, relative_difference
from support.onnx_walk import walk_onnx, walked_families
from support.structure import by_class
from support.tiny import FAMILIES, MOE_FAMILIES, VOCAB

# Rotary embeddings whose frequencies change at a length that the compared inputs cross.
LENGTH_8 = {"max_position_embeddings": 8}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
RULES = (  # `make test` runs these: stages, history and norms, weights of all iterates, two spans
    {"rule": "heun"},
    {"rule": "poly_blend", "schedule": (0.1, 0.2, 0.3, 0.3, 0.1)},
    {"rule": "anderson", "kv": "reference"},
    {"rule": "euler", "span": ((0, 2), (3, 5)), "kv": "per_step"},
)
MORE_RULES = (
    {"rule": "ema_sched", "schedule": (0.5, 0.25, 0.75, 0.1)},
    {"rule": "aitken", "kv": "reference"},
    {"rule": "norm_stab"},
    {"rule": "uniform", "mode": "layer", "kv": "per_step"},
    {"rule": "residual_scaled"},
    {"rule": "ema"},
    {"rule": "midpoint"},
    {"rule": "rk4"},
    {"rule": "heavy_ball"},
    {"rule": "input_anchor"},
    {"rule": "uniform"},
    {"rule": "euler", "span": ((0, 1), (2, 5)), "anchor": 0.25},
)


@pytest.mark.parametrize("family", by_class(FAMILIES, ("llama", "gpt2")))
def test_graph_equals_torch(graph, plain, family):
    roots = []
    for spec in LOOPS:
        roots.append(graph(family, **spec))
        assert_equals_torch(roots[-1])
    one_step, native = OnnxModel(roots[0]), plain(family)
    for scenario in make_scenarios(VOCAB, loopexport.open_export(roots[0]).spec):
        difference = relative_difference(one_step, native, scenario)
        assert difference <= TOLERANCES["fp32"], f"one step is the base, {scenario.name}: {difference:.3g}"
    tokens = make_scenarios(VOCAB, loopexport.open_export(roots[0]).spec)[0]
    base, looped = (run_graph(OnnxModel(root), tokens) for root in roots[:2])
    assert np.abs(base - looped).max() > 1e-2 * np.abs(base).max(), "the loop is idle, so that equality means nothing"


@pytest.mark.parametrize("family", by_class((*QUICK_FAMILIES, "qwen3"), ("llama",)))
def test_more_loops_equal_torch(graph, family):
    for spec in MORE_LOOPS:
        frozen = {"frozen_routing": True} if family in MOE_FAMILIES and "mode" in spec else {}
        assert_equals_torch(graph(family, **spec, **frozen))


@pytest.mark.matrix
def test_tables_of_fixed_length_are_read_at_any_length(tmp_path):
    """GPT-Neo cuts its masks, local ones too, out of a table for all positions."""
    fields = {"num_layers": 4, "num_hidden_layers": 4, "attention_types": [[["global", "local"], 2]]}
    assert str(walk_onnx("gpt_neo", tmp_path, **fields)[0]) == "works"


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {**LENGTH_8, "rope_parameters": DYNAMIC}),
        ("phi3", {"original_max_position_embeddings": 8, "rope_parameters": LONGROPE}),
    ],
)
def test_rotary_frequencies_that_depend_on_the_length_do_so_in_the_graph(tmp_path, family, fields):
    assert str(walk_onnx(family, tmp_path, num_hidden_layers=4, **fields)[0]) == "works"
    prompt = torch.tensor([[5, 6, 7, 8, 9]])
    ours = OnnxModel(tmp_path / "out").generate(prompt.numpy(), max_new_tokens=12, eos_token_ids=())
    theirs = load_torch(tmp_path / "out", 3).generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=-1)
    assert ours.tolist() == theirs[:, 5:].tolist()


def test_code_that_depends_on_values_is_refused(tmp_path):
    """PhiMoE scales its rotations by a branch on the largest position."""
    rope = {**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.3}
    outcome, _ = walk_onnx("phimoe", tmp_path, num_hidden_layers=4, rope_parameters=rope)
    assert str(outcome).startswith("refused: what its code does depends on values that it computed")


def test_pairs_rotate_as_complex_numbers():
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import apply_rotary_emb

    query, key = torch.randn(2, 4, 3, 8), torch.randn(2, 1, 3, 8)
    angles = torch.rand(2, 3, 4) * 6
    rotated = apply_rotary_emb(query, key, torch.polar(torch.ones_like(angles), angles) * 2.0)
    with OnnxSubstitutes():
        ours = apply_rotary_emb(query, key, torch.polar(torch.ones_like(angles), angles) * 2.0)
    for mine, theirs in zip(ours, rotated, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_numbers_near_0_and_1_survive_optimisation():
    """onnxscript's optimiser takes an epsilon of 1e-8 for 0, and drops it; exactly 0 and 1 are worth dropping."""

    class Model(torch.nn.Module):
        def forward(self, x):
            return (x + 1e-8) * 1.000001 + 0.0

    program = torch.export.export(Model(), (torch.zeros(3),))
    model = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False).model
    optimise(model)
    assert sorted(node.op_type for node in model.graph if node.op_type != "Identity") == ["Add", "Mul"]
    assert len(model.graph.inputs) == 1


@pytest.mark.matrix
@pytest.mark.parametrize("family", walked_families())
def test_every_family_that_can_be_looped_comes_out_as_recorded(family, tmp_path):
    """`walk_onnx` itself fails where a graph does not equal torch."""
    outcome, difference = walk_onnx(family, tmp_path)
    LARGEST.append(difference)
    if families.releases()[0] == RELEASE:
        assert outcome.status == families.onnx_outcome(family)[0], str(outcome)


@pytest.mark.parametrize(
    "rule",
    [*RULES, *(pytest.param(rule, marks=pytest.mark.matrix) for rule in MORE_RULES)],
    ids=lambda rule: "-".join(map(str, rule.values())),
)
def test_every_rule_equals_torch(graph, rule):
    assert_equals_torch(graph("llama", steps=4, **rule))
