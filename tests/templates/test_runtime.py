"""A looped model in the hands of transformers: generation, compilation, offloading, training."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from support.compare import assert_bitwise, assert_close, assert_differs
from support.oracle import Oracle
from support.tiny import NUM_LAYERS, SPAN, tiny_tokens

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
EXACT_POLICIES = ("shared", "per_step")  # those whose cached decode equals a full forward


def greedy_by_full_forwards(model, tokens, new_tokens):
    """Greedy decoding without a cache: the slow path that the fast one is held to."""
    for _ in range(new_tokens):
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return tokens


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kv", EXACT_POLICIES)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_greedy_generation_equals_full_forwards(looped, family, kv, cache):
    model, tokens = looped(family, kv=kv), tiny_tokens(2, 6)
    model.generation_config.eos_token_id = None
    ours = model.generate(tokens, max_new_tokens=12, do_sample=False, cache_implementation=cache)
    assert torch.equal(ours, greedy_by_full_forwards(model, tokens, 12))


def test_generation_without_cache_equals_generation_with_it(looped):
    model, tokens = looped("llama"), tiny_tokens(1, 6)
    ours = model.generate(tokens, max_new_tokens=12, do_sample=False, use_cache=False)
    assert torch.equal(ours, model.generate(tokens, max_new_tokens=12, do_sample=False))


@pytest.mark.parametrize("kv", EXACT_POLICIES)
def test_left_padded_generation_equals_unpadded(looped, kv):
    model = looped("llama", kv=kv)
    short, long = tiny_tokens(1, 5, seed=3), tiny_tokens(1, 9, seed=4)
    padded = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), short], dim=1), long])
    mask = (padded != 0).long()
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    together = model.generate(padded, attention_mask=mask, **options)
    assert torch.equal(together[0, 9:], model.generate(short, **options)[0, 5:])
    assert torch.equal(together[1, 9:], model.generate(long, **options)[0, 9:])


@pytest.mark.parametrize("kv", EXACT_POLICIES)
def test_beam_search_with_cache_equals_beam_search_without(looped, kv):
    model, tokens = looped("llama", kv=kv), tiny_tokens(2, 6)
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    with_cache = model.generate(tokens, **options, use_cache=True)
    assert torch.equal(with_cache, model.generate(tokens, **options, use_cache=False))


def test_sampling_with_cache_equals_sampling_without(looped):
    model, tokens = looped("llama"), tiny_tokens(1, 6)
    options = {"max_new_tokens": 8, "do_sample": True, "top_k": 5}
    torch.manual_seed(0)
    with_cache = model.generate(tokens, **options, use_cache=True)
    torch.manual_seed(0)
    assert torch.equal(with_cache, model.generate(tokens, **options, use_cache=False))


@pytest.mark.parametrize("kv", EXACT_POLICIES)
@pytest.mark.parametrize("assistant_family", ["llama", "prompt lookup"])
def test_assisted_generation_equals_greedy(looped, plain, kv, assistant_family):
    model, tokens = looped("llama", kv=kv), tiny_tokens(1, 8)
    options = {"max_new_tokens": 12, "do_sample": False}
    assistant = (
        {"prompt_lookup_num_tokens": 3}
        if assistant_family == "prompt lookup"
        else {"assistant_model": plain(assistant_family)}
    )
    ours = model.generate(tokens, **options, **assistant)
    assert torch.equal(ours, model.generate(tokens, **options))


FROZEN = {"mode": "layer", "frozen_routing": True, "norm_interpolation": True}


@pytest.mark.parametrize("kv", ["shared", "per_step", "reference"])
@pytest.mark.parametrize(("family", "fields"), [("llama", {}), ("qwen3_moe", FROZEN), ("deepseek_v3", FROZEN)])
def test_cpu_and_disk_offload_equal_the_plain_load(looped, export_dir, tmp_path, family, fields, kv):
    out = export_dir(family, kv=kv, **fields)
    layers = {f"model.layers.{i}": ("disk" if i in range(*SPAN) else "cpu") for i in range(NUM_LAYERS)}
    device_map = {
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
        **layers,
    }
    offloaded = AutoModelForCausalLM.from_pretrained(
        out, trust_remote_code=True, device_map=device_map, offload_folder=tmp_path
    ).eval()
    tokens = tiny_tokens(2, 9)
    assert all(weight.is_meta for i in range(*SPAN) for weight in offloaded.model.layers[i].parameters())
    options = {"max_new_tokens": 5, "do_sample": False}
    model = looped(family, kv=kv, **fields)
    with torch.no_grad():
        assert_close(offloaded(tokens).logits, model(tokens).logits)
    assert torch.equal(offloaded.generate(tokens, **options), model.generate(tokens, **options))


def test_device_map_auto_loads(export_dir, looped):
    model = AutoModelForCausalLM.from_pretrained(export_dir("llama"), trust_remote_code=True, device_map="auto")
    tokens = tiny_tokens(1, 6).to(model.device)
    with torch.no_grad():
        assert_close(model(tokens).logits.cpu(), looped("llama")(tokens.cpu()).logits)


@pytest.mark.parametrize("mode", ["block", "layer"])
def test_hidden_states_are_those_of_every_layer_evaluation(looped, mode):
    """1 + L + (K-1) w states, in the order in which layers ran; the last is the final norm's output, as ever."""
    model, tokens = looped("llama", mode=mode), tiny_tokens(2, 9)
    with torch.no_grad():
        output = model(tokens, output_hidden_states=True, use_cache=False)
        states = output.hidden_states
        expected = model.model(tokens, use_cache=False).last_hidden_state
    assert len(states) == 1 + NUM_LAYERS + 2 * (SPAN[1] - SPAN[0])
    assert_bitwise(states[-1], expected)
    assert_bitwise(states[0], model.model.embed_tokens(tokens))


def test_copied_model_is_independent(looped):
    model, tokens = looped("llama"), tiny_tokens(1, 6)
    twin = copy.deepcopy(model)
    twin.config.loop_steps = 1
    with torch.no_grad():
        assert_differs(model(tokens).logits, twin(tokens).logits)
    assert model.config.loop_steps == 3


@pytest.mark.parametrize("kv", ["shared", "per_step", "reference"])
@pytest.mark.parametrize("mode", ["block", "layer"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(looped, kv, mode, use_reentrant):
    model, tokens = looped("llama", kv=kv, mode=mode), tiny_tokens(2, 9)

    def loss_and_gradients():
        model.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    model.train()
    plain_loss, plain_gradients = loss_and_gradients()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    loss, gradients = loss_and_gradients()
    assert_close(loss, plain_loss)
    for name, gradient in plain_gradients.items():
        assert_close(gradients[name], gradient, 1e-4)


@pytest.mark.parametrize("mode", ["block", "layer"])
def test_gradients_equal_those_of_the_oracle(looped, plain, mode):
    """Gradients also flow through the keys and values that iterations share."""
    model, base, tokens = looped("llama", mode=mode), plain("llama"), tiny_tokens(2, 9)
    model(tokens, use_cache=False).logits.square().mean().backward()
    with torch.enable_grad():
        Oracle(base, SPAN, 3, mode=mode).logits(tokens, [9]).square().mean().backward()
    for (name, ours), theirs in zip(model.named_parameters(), base.parameters(), strict=True):
        assert theirs.grad.abs().max() > 0, name
        assert_close(ours.grad, theirs.grad, 1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_trains_and_merges(looped, checkpointing):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model, tokens = looped("llama"), tiny_tokens(2, 9)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    if checkpointing:
        adapted.gradient_checkpointing_enable()
        adapted.enable_input_require_grads()
    adapted.train()
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = adapted(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1, losses
    adapted.eval()
    with torch.no_grad():
        before = adapted(tokens).logits
        merged = adapted.merge_and_unload()
        assert_close(merged(tokens).logits, before, 1e-4)


def test_text_generation_pipeline_runs(export_dir):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, pipeline

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "one": 3, "two": 4}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    generate = pipeline("text-generation", str(export_dir("llama")), tokenizer=tokenizer, trust_remote_code=True)
    assert generate("one two one", max_new_tokens=4, do_sample=False)[0]["generated_text"].startswith("one two one")


def test_per_step_refuses_a_cache_filled_under_another_setting(looped):
    model, tokens = looped("llama", kv="per_step"), tiny_tokens(1, 6)
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
        model.config.loop_steps = 4
        with pytest.raises(ValueError, match="filled under another loop setting"):
            model(tokens[:, :1], past_key_values=cache)
        model.config.loop_steps = 1
        cache = model(tokens, use_cache=True).past_key_values
        model.config.loop_steps = 3
        with pytest.raises(ValueError, match="start with a new cache"):
            model(tokens[:, :1], past_key_values=cache)


def test_per_step_fills_one_slot_for_each_pass_and_shared_none(looped):
    tokens, width = tiny_tokens(1, 6), SPAN[1] - SPAN[0]
    for kv, slots in (("shared", NUM_LAYERS), ("reference", NUM_LAYERS), ("per_step", NUM_LAYERS + 2 * width)):
        with torch.no_grad():
            cache = looped("llama", kv=kv)(tokens, use_cache=True).past_key_values
        assert len(cache.layers) == slots
        assert {layer.get_seq_length() for layer in cache.layers} == {6}


@pytest.mark.parametrize("kv", EXACT_POLICIES)
def test_static_cache_can_be_reset_and_used_again(looped, kv):
    model, tokens = looped("llama", kv=kv), tiny_tokens(2, 9)
    cache = StaticCache(config=model.config, max_cache_len=12)
    with torch.no_grad():
        first = model(tokens, past_key_values=cache).logits
        cache.reset()
        assert_bitwise(model(tokens, past_key_values=cache).logits, first)


@pytest.mark.parametrize("kv", EXACT_POLICIES)
def test_cropped_cache_continues_as_if_never_extended(looped, kv):
    model, tokens = looped("llama", kv=kv), tiny_tokens(1, 9)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
        cache.crop(-3)
        again = model(tokens[:, 6:], past_key_values=cache).logits
        assert_close(again, model(tokens, use_cache=False).logits[:, 6:])
