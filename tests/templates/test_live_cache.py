"""A cache remembers the loop that filled it; and caches that transformers fills in its own ways."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers import CompileConfig, DynamicCache, StaticCache

from support.compare import assert_bitwise, assert_close, assert_differs
from support.forwards import full_forward
from support.tiny import tiny_tokens

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
TOKENS = tiny_tokens(1, 12)
PREFILL = 8
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def change(model, **fields):
    for name, value in fields.items():
        setattr(model.config, f"loop_{name}", value)


@torch.no_grad()
def filled(model, make=DynamicCache):
    cache = make(config=model.config)
    model(TOKENS[:, :PREFILL], past_key_values=cache)
    return cache


@torch.no_grad()
def rest(model, cache):
    return model(TOKENS[:, PREFILL : PREFILL + 1], past_key_values=cache).logits


CHANGES = {
    "span": {"span": [2, 4]},
    "span and steps, as many slots": {"span": [2, 3], "steps": 5},
    "mode": {"mode": "layer"},
    "rule": {"rule": "ema"},
    "rule of as many evaluations": {"rule": "midpoint", "steps": 2, "span": [1, 2]},
    "steps": {"steps": 4},
    "damping": {"damping": 0.9},
    "anchor": {"anchor": 0.5},
    "decode": {"decode": "bypass"},
    "policy": {"kv": "reference"},
    "no loop": {"steps": 1},
}
ALLOWED_UNDER_SHARED = {"rule", "steps", "damping", "anchor", "decode", "no loop"}


@pytest.mark.parametrize("kv", ["shared", "per_step"])
@pytest.mark.parametrize("what", CHANGES)
def test_a_cache_goes_on_under_another_loop_or_refuses_it(looped, what, kv):
    model = looped("llama", kv=kv, span=(1, 3))
    cache, other = filled(model), CHANGES[what]
    before = rest(model, copy.deepcopy(cache))
    change(model, **other)
    if kv == "shared" and what in ALLOWED_UNDER_SHARED:
        assert_differs(rest(model, cache), before)
        return
    with pytest.raises(ValueError, match="the K/V cache was filled under another loop setting"):
        rest(model, cache)
    change(model, span=[1, 3], steps=3, mode="block", rule="euler", damping=None, anchor=0.0, decode="full", kv=kv)
    assert_bitwise(rest(model, cache), before)  # the refusal came before any layer stored there


@pytest.mark.parametrize("before", [1, 3])
def test_per_step_refuses_a_cache_without_or_with_slots(looped, before):
    """Filled by the base, or gone on by the base."""
    model = looped("llama", kv="per_step")
    model.config.loop_steps = before
    cache = filled(model)
    model.config.loop_steps = 4 - before
    with pytest.raises(ValueError, match="start with a new cache"):
        rest(model, cache)


def test_a_cache_that_was_emptied_forgets(looped):
    model = looped("llama")
    cache = filled(model, lambda config: StaticCache(config=config, max_cache_len=16))
    cache.reset()
    change(model, span=[2, 4])
    with torch.no_grad():
        ours = model(TOKENS, past_key_values=cache).logits
    assert_close(ours, full_forward(model, TOKENS))


SLOTS = {
    "more": ({"span": (1, 3), "steps": 2}, {"span": [1, 4], "steps": 4}),
    "fewer": ({"span": (1, 4), "steps": 4}, {"span": [1, 3], "steps": 2}),
    "of other types": ({"span": (0, 1), "steps": 3}, {"span": [1, 2], "steps": 3}),
    "of other types, the other way round": ({"span": (1, 2), "steps": 3}, {"span": [0, 1], "steps": 3}),
}
CACHES = {
    "static": lambda config: StaticCache(config=config, max_cache_len=16),
    "dynamic": lambda config: DynamicCache(config=config),
    "dynamic without a config": lambda config: DynamicCache(),
}


def emptied(cache):
    """A dynamic cache keeps its length when it is reset, and a dynamic sliding one cannot be emptied."""
    cache.reset() if isinstance(cache, StaticCache) else cache.crop(-PREFILL)
    return cache


@pytest.mark.parametrize(("family", "kind"), [("gemma3_text", "static"), *(("llama", kind) for kind in CACHES)])
@pytest.mark.parametrize("slots", SLOTS)
def test_an_emptied_cache_gets_the_slots_of_the_next_loop(looped, family, kind, slots):
    before, after = SLOTS[slots]
    model = looped(family, kv="per_step", **before)
    cache = emptied(filled(model, CACHES[kind]))
    change(model, **after)
    fresh = filled(model, CACHES[kind])
    filled(model, lambda config: cache)
    assert [type(each) for each in cache.layers] == [type(each) for each in fresh.layers]
    assert_bitwise(rest(model, cache), rest(model, fresh))


def test_generation_goes_on_with_its_static_cache_under_another_loop(looped):
    """`generate` keeps a static cache on the model, and resets it."""
    model, options = looped("llama", kv="per_step", span=(1, 3), steps=2), {**GREEDY, "max_new_tokens": 4}
    model.generate(TOKENS, cache_implementation="static", **options)
    change(model, span=[1, 4], steps=4)
    ours = model.generate(TOKENS, cache_implementation="static", **options)
    assert torch.equal(ours, model.generate(TOKENS, **options))


def test_a_copied_cache_remembers(looped):
    model = looped("llama")
    twin = copy.deepcopy(filled(model))
    assert_close(rest(model, twin), full_forward(model, TOKENS)[:, PREFILL : PREFILL + 1])
    twin = copy.deepcopy(filled(model))
    change(model, mode="layer")
    with pytest.raises(ValueError, match=r"another loop setting \(mode\)"):
        rest(model, twin)


def test_prefix_tuning_is_refused_by_its_name_under_per_step(looped):
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(looped("llama"), config)(TOKENS)
    with pytest.raises(ValueError, match="prefix tuning; start with a new cache, or use kv shared"):
        peft.get_peft_model(looped("llama", kv="per_step"), config)(TOKENS)


@pytest.mark.parametrize("kv", ["shared", "per_step"])
@pytest.mark.parametrize("exit_after", [1, 2, 4])
def test_a_model_drafts_for_itself_with_early_exit(looped, kv, exit_after):
    """Exits before, inside and behind the span 1:4; the answer is the whole model's, and so is its config."""
    model = looped("llama", kv=kv)
    expected = model.generate(TOKENS, max_new_tokens=6, **GREEDY)
    ours = model.generate(TOKENS, max_new_tokens=6, assistant_early_exit=exit_after, **GREEDY)
    assert torch.equal(ours, expected)
    assert model.config.num_hidden_layers == 6


@pytest.mark.skipif(not TRANSFORMERS_5, reason="transformers 4 does not compile the prefill")
@pytest.mark.matrix
@pytest.mark.parametrize("kv", ["shared", "per_step"])
def test_compiled_chunked_prefill_equals_plain_generation(looped, kv):
    torch._dynamo.reset()
    model = looped("llama", kv=kv)
    compile_config = CompileConfig(backend="eager", fullgraph=False)
    compile_config._compile_all_devices = True  # transformers compiles on accelerators only
    options = {"cache_implementation": "static", "prefill_chunk_size": 6, "compile_config": compile_config}
    ours = model.generate(TOKENS, max_new_tokens=3, **GREEDY, **options)
    assert torch.equal(ours, model.generate(TOKENS, max_new_tokens=3, **GREEDY))


@pytest.mark.skipif(not TRANSFORMERS_5, reason="transformers 4 has no early initialisation")
def test_a_compiled_prompt_of_one_token_loops_under_bypass(looped):
    torch._dynamo.reset()
    model = looped("llama", decode="bypass")

    def one_token(forward):
        cache = StaticCache(config=model.config, max_cache_len=8)
        cache.early_initialization(1, 2, 16, torch.float32, "cpu")
        with torch.no_grad():
            return forward(TOKENS[:, :1], past_key_values=cache).logits

    ours = one_token(torch.compile(model, fullgraph=True, backend="eager"))
    assert_close(ours, one_token(model))
    model.config.loop_steps = 1
    assert_differs(ours, one_token(model))


@pytest.mark.skipif(not hasattr(transformers.GenerationMixin, "generate_batch"), reason="no continuous batching")
class TestContinuousBatching:
    """Prompts and decode steps of several requests in one forward."""

    @staticmethod
    def answers(model, prompts):
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        found = model.generate_batch(
            prompts,
            generation_config=GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=64, page_size=16, max_batch_tokens=128),
            progress_bar=False,
        )
        return [each.generated_tokens for each in found.values()]

    @pytest.mark.skipif(not TRANSFORMERS_5, reason="it crashes the base too in transformers 4")
    def test_every_request_gets_its_own_answer(self, looped):
        model = looped("llama")
        prompts = [tiny_tokens(1, length, seed=length)[0].tolist() for length in (5, 9, 7)]
        alone = [
            model.generate(torch.tensor([each]), max_new_tokens=6, **GREEDY)[0, len(each) :].tolist()
            for each in prompts
        ]
        assert self.answers(model, prompts) == alone

    @pytest.mark.parametrize(
        "fields", [{"kv": "per_step"}, {"kv": "reference"}, {"decode": "bypass"}, {"decode": "first_n", "first_n": 2}]
    )
    def test_what_would_not_be_exact_is_refused_at_the_call(self, looped, fields):
        model = looped("llama", **fields)
        with pytest.raises(ValueError, match="exact with kv shared and decode full only, not with"):
            model.generate_batch([[5, 6, 7]])

    @pytest.mark.skipif(not TRANSFORMERS_5, reason="it crashes the base too in transformers 4")
    def test_one_step_is_exact_whatever_the_fields(self, looped):
        model = looped("llama", kv="per_step", decode="bypass")
        model.config.loop_steps = 1
        assert self.answers(model, [[5, 6, 7]])


def test_identity_forwards_are_bitwise_the_base_with_a_marked_cache(looped, plain):
    model = looped("llama")
    model.config.loop_steps = 1
    base = plain("llama")
    assert_bitwise(rest(model, filled(model)), rest(base, filled(base)))
