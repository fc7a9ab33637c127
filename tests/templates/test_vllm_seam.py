"""How looped layers meet vLLM's attention, without vLLM: whatever it cuts a prompt into, logits are transformers'.

`vllm_double.py` stands in for the engine. That the engine is as the double has it is for `test_vllm.py` to show.
"""

from __future__ import annotations

import pytest
import torch
import transformers

import loopexport
from loopexport.templates.looped_spec import LoopSpec
from loopexport.templates.looped_vllm_limits import vllm_context, vllm_refusal
from support.compare import TOLERANCE, assert_close, assert_differs
from support.loaded_code import code_beside
from support.structure import REPRESENTATIVES
from support.tiny import FAMILIES, SPAN, save_tiny, tiny_tokens
from support.vllm_double import Engine

if transformers.__version__.startswith("4."):
    pytest.skip("vLLM runs models of transformers 5", allow_module_level=True)

PROMPTS = [tiny_tokens(1, length, seed=length) for length in (19, 11)]
# The prompts whole; cut; and token by token once they have met, as a running engine would.
CUTS = {
    "whole": [[(0, 19)], [(1, 11)]],
    "chunked": [[(0, 7)], [(0, 5), (1, 4)], [(1, 6), (0, 6)], [(0, 1), (1, 1)]],
    "decoding": [[(0, 16), (1, 8)], *[[(0, 1), (1, 1)]] * 3],
}
POLICIES = ("shared", "per_step")
SERVED = [
    (family, kv)
    for family in FAMILIES
    for kv in POLICIES
    if vllm_refusal(family, LoopSpec(span=SPAN, steps=3, kv=kv), {}) is None
]


def by_transformers(model):
    with torch.no_grad():
        return [model(prompt, use_cache=False).logits for prompt in PROMPTS]


def largest_difference(ours, theirs):
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("family", "kv"),
    [pytest.param(family, kv, marks=() if family in REPRESENTATIVES else pytest.mark.matrix) for family, kv in SERVED],
)
def test_however_prompts_are_cut_logits_are_those_of_transformers(looped, plain, export_dir, monkeypatch, family, kv):
    theirs = by_transformers(looped(family, kv=kv))
    for cut in CUTS.values():
        ours = Engine(export_dir(family, kv=kv), monkeypatch).logits(PROMPTS, cut)
        for each, expected in zip(ours, theirs, strict=True):
            assert_close(each, expected)
    assert_differs(theirs[0], by_transformers(plain(family))[0])


LOOPS = [
    {"mode": "layer", "anchor": 0.5, "norm_interpolation": True},
    {"span": ((0, 2), (3, 5)), "rule": "midpoint"},
    {"rule": "rk4", "steps": 2},
    {"span": ((0, 2), (3, 5)), "steps": (2, 3)},
]
# Detours that overlap; detours that do not end where they began, and a layer that is left out.
PATHS = [((0, 4), (1, 5), (2, 6)), ((0, 2), (3, 5), (1, 2), (4, 5), (5, 6))]


@pytest.mark.parametrize("kv", POLICIES)
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: ",".join(loop))
@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_moe"])
def test_other_loops_are_served_as_they_are(looped, export_dir, monkeypatch, family, loop, kv):
    theirs = by_transformers(looped(family, kv=kv, **loop))
    ours = Engine(export_dir(family, kv=kv, **loop), monkeypatch).logits(PROMPTS, CUTS["chunked"])
    for each, expected in zip(ours, theirs, strict=True):
        assert_close(each, expected)


@pytest.mark.parametrize("kv", POLICIES)
@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_paths_are_served_as_they_are(looped, export_dir, monkeypatch, family, path, kv):
    theirs = by_transformers(looped(family, kv=kv, path=path))
    ours = Engine(export_dir(family, kv=kv, path=path), monkeypatch).logits(PROMPTS, CUTS["chunked"])
    for each, expected in zip(ours, theirs, strict=True):
        assert_close(each, expected)


WHOLE = {"enable_chunked_prefill": False, "enable_prefix_caching": False}
MOE_LOOP = {"mode": "layer", "anchor": 0.5, "norm_interpolation": True, "frozen_routing": True}


def by_transformers_token_by_token(model, num_prompt_tokens):
    """Logits of all tokens: of the first ones in one chunk, then of one at a time."""
    return [torch.cat(list(_steps(model, *each)), dim=1) for each in zip(PROMPTS, num_prompt_tokens, strict=True)]


@torch.no_grad()
def _steps(model, prompt, num_prompt_tokens):
    output = model(prompt[:, :num_prompt_tokens], use_cache=True)
    yield output.logits
    for token in prompt[0, num_prompt_tokens:]:
        output = model(token.view(1, 1), past_key_values=output.past_key_values, use_cache=True)
        yield output.logits


@pytest.mark.parametrize("loop", [{}, MOE_LOOP, {"span": ((0, 2), (3, 5))}, {"path": PATHS[0]}], ids=",".join)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
def test_kv_reference_decodes_as_in_transformers(looped, export_dir, monkeypatch, family, loop):
    if family == "llama":
        loop = {name: value for name, value in loop.items() if name != "frozen_routing"}
    model = looped(family, kv="reference", **loop)
    theirs = by_transformers_token_by_token(model, (16, 8))
    ours = Engine(export_dir(family, kv="reference", **loop), monkeypatch, **WHOLE).logits(PROMPTS, CUTS["decoding"])
    for each, expected in zip(ours, theirs, strict=True):
        assert_close(each, expected)
    assert_differs(theirs[0], by_transformers(model)[0])


@pytest.mark.parametrize("kv", ["shared", "reference"])
@pytest.mark.parametrize("steps", [[[(0, 16)], [(0, 1), (1, 8)], *[[(0, 1), (1, 1)]] * 2, [(1, 1)]], CUTS["decoding"]])
def test_generated_tokens_bypass_the_loop_as_in_transformers(looped, export_dir, monkeypatch, kv, steps):
    theirs = by_transformers_token_by_token(looped("llama", kv=kv, decode="bypass"), (16, 8))
    engine = Engine(export_dir("llama", kv=kv, decode="bypass"), monkeypatch, **WHOLE)
    for each, expected in zip(engine.logits(PROMPTS, steps), theirs, strict=True):
        assert_close(each, expected[:, : each.shape[1]])
    assert_differs(theirs[0], by_transformers_token_by_token(looped("llama", kv=kv), (16, 8))[0])


@pytest.mark.parametrize("left", [*WHOLE, "enforce_eager"])
def test_bypass_needs_whole_prompts_and_no_compiler(export_dir, monkeypatch, left):
    settings = {**WHOLE, "enforce_eager": True}
    with pytest.raises(ValueError, match="--no-enable-prefix-caching --enforce-eager, or set loop_decode to full"):
        Engine(export_dir("llama", decode="bypass"), monkeypatch, **{**settings, left: not settings[left]})
    assert "-prefix-caching --enforce-eager\n" in (export_dir("llama", decode="bypass") / "README.md").read_text()


@pytest.mark.parametrize("left", WHOLE)
def test_kv_reference_needs_prompts_in_one_chunk(export_dir, monkeypatch, left):
    with pytest.raises(ValueError, match="add --no-enable-chunked-prefill --no-enable-prefix-caching"):
        Engine(export_dir("llama", kv="reference"), monkeypatch, **{**WHOLE, left: True})
    assert "--trust-remote-code --no-enable-chunked" in (export_dir("llama", kv="reference") / "README.md").read_text()


@pytest.mark.parametrize("kv", POLICIES)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_frozen_routing_is_that_of_transformers(looped, export_dir, monkeypatch, family, kv):
    theirs = by_transformers(looped(family, kv=kv, **MOE_LOOP))
    engine = Engine(export_dir(family, kv=kv, **MOE_LOOP), monkeypatch)
    for each, expected in zip(engine.logits(PROMPTS, CUTS["chunked"]), theirs, strict=True):
        assert_close(each, expected)
    marked = {name.rpartition(".mlp.")[0] for name, _ in engine.model.named_buffers() if "loop_own_router" in name}
    layers = engine.model.model.layers
    assert (
        marked == {f"model.layers.{index}" for index in range(*SPAN) if hasattr(layers[index].mlp, "experts")} != set()
    )


def given_nothing(stand_in, attention, given):
    stand_in.attention, stand_in.given, stand_in.count = attention, None, 0


def attention_of_the_layer(seam, layer, index, k=0):
    return layer.self_attn.attn


@pytest.mark.parametrize(("kv", "cut"), [("shared", "chunked"), ("shared", "decoding"), ("per_step", "chunked")])
def test_a_broken_stand_in_would_be_seen(looped, export_dir, monkeypatch, kv, cut):
    theirs = by_transformers(looped("llama", kv=kv))
    engine = Engine(export_dir("llama", kv=kv), monkeypatch)
    code = code_beside(engine.model, "looped_vllm")
    if kv == "shared":
        monkeypatch.setattr(code.VllmAttention, "__init__", given_nothing)
    else:
        monkeypatch.setattr(code.VllmSeam, "_attention", attention_of_the_layer)
    assert largest_difference(engine.logits(PROMPTS, CUTS[cut]), theirs) > 1000 * TOLERANCE


def test_keys_and_values_that_are_not_written_back_would_be_seen(looped, export_dir, monkeypatch):
    theirs = by_transformers_token_by_token(looped("llama", kv="reference"), (16, 8))
    engine = Engine(export_dir("llama", kv="reference"), monkeypatch, **WHOLE)
    seam = code_beside(engine.model, "looped_vllm").VllmSeam
    monkeypatch.setattr(seam, "_write_back", lambda self, call, hidden: hidden)
    assert largest_difference(engine.logits(PROMPTS, CUTS["decoding"]), theirs) > 1000 * TOLERANCE


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_all_routers_stay_modules_of_their_own_with_a_compiler(export_dir, monkeypatch, steps, enforce_eager):
    model = Engine(export_dir("glm4_moe", steps=steps), monkeypatch, enforce_eager=enforce_eager).model
    marked = {index for index, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "loop_own_router")}
    sparse = {index for index, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")}
    assert marked == (set() if enforce_eager else sparse)


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
FACTORS = [1.0 + 0.1 * index for index in range(8)]
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64,
    "short_factor": FACTORS, "long_factor": [3 * each for each in FACTORS],
}  # fmt: skip
MODELS = [
    ("llama", {"max_position_embeddings": 64, "rope_parameters": DYNAMIC}, "add --max-model-len 64"),
    ("phi3", {"original_max_position_embeddings": 64, "rope_parameters": LONGROPE}, "add --max-model-len 64"),
    ("qwen3_moe", {"hidden_act": "gelu"}, "ignores hidden_act \\(gelu\\)"),
    ("mixtral", {"num_experts_per_tok": 1}, "weights a single expert"),
]


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("family", "fields", "reason"), MODELS, ids=["dynamic", "longrope", "gelu", "one expert"])
def test_models_that_vllm_computes_otherwise_are_refused(tmp_path, monkeypatch, family, fields, reason, steps):
    root = loopexport.convert(
        str(save_tiny(family, tmp_path / "base", **fields)), tmp_path / "out", span=SPAN, steps=steps
    ).root
    with pytest.raises(ValueError, match=reason):
        Engine(root, monkeypatch)
    if "rope_parameters" in fields:
        Engine(root, monkeypatch, max_model_len=64)


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 9}, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, None),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 9}, 9),
        ({"rope_scaling": {"type": "su"}, "original_max_position_embeddings": 5, "max_position_embeddings": 9}, 5),
        ({"rope_scaling": {"type": ["dynamic"]}, "max_position_embeddings": "wide"}, None),
        ({"rope_scaling": True}, None),
        ({"rope_parameters": {"a": {"rope_type": "default"}, "b": LONGROPE}, "max_position_embeddings": 99}, 64),
    ],
)
def test_context_within_which_rotary_frequencies_stay_is_read_from_old_and_new_configs(config, length):
    assert vllm_context(config) == length


def test_scale_of_logits_is_told_where_vllm_looks_for_it(export_dir, monkeypatch):
    assert Engine(export_dir("granite"), monkeypatch).model.config.logit_scale == 0.5


def test_a_loop_of_one_step_is_served_whatever_the_settings(export_dir, plain, monkeypatch):
    engine = Engine(export_dir("qwen3_moe", steps=1), monkeypatch, speculative_config=object())
    for ours, theirs in zip(engine.logits(PROMPTS, CUTS["chunked"]), by_transformers(plain("qwen3_moe")), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("kv", POLICIES)
def test_attention_layers_that_are_not_found_are_told(export_dir, monkeypatch, kv):
    with pytest.raises(ValueError, match="this release keeps its attention layers elsewhere"):
        Engine(export_dir("llama", kv=kv), monkeypatch, attribute="elsewhere").logits(PROMPTS, CUTS["whole"])


def test_a_layer_that_asks_its_attention_twice_is_told(export_dir, monkeypatch):
    engine = Engine(export_dir("llama"), monkeypatch)
    attention = type(engine.model.model.layers[SPAN[0]].self_attn)
    once = attention.forward
    monkeypatch.setattr(attention, "forward", lambda *args, **kwargs: [once(*args, **kwargs) for _ in range(2)][1])
    with pytest.raises(ValueError, match="called its attention 2 times, not once"):
        engine.logits(PROMPTS, CUTS["whole"])
