"""Loops over recurrent layers: the delta rule, state spaces, short convolutions."""

from __future__ import annotations

import copy
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import loopexport
from support.compare import assert_bitwise, assert_close, assert_differs
from support.recurrent import shared_by_hand, unrolled_along, unrolled_copy
from support.tiny import RECURRENT, save_tiny, tiny_tokens

HAS_STATE_CALLS = hasattr(DynamicCache, "get_conv_state")
pytestmark = pytest.mark.skipif(not HAS_STATE_CALLS, reason="a cache with recurrent states came with transformers 5")

SPAN = (1, 4)
PATH = ((0, 4), (1, 3), (2, 5), (5, 6))  # layer 2 three times
TOKENS = tiny_tokens(2, 11)
LOOPED = [name for name in RECURRENT if name != "minimax" and name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
WITH_EXPERTS = ("qwen3_next", "jamba", "nemotron_h")
# Mamba-1 of transformers starts each chunk of several tokens from an empty state.
CUTS = {"jamba": [(8, 9, 10, 11)]}
ALL_CUTS = [(5, 6, 11), (1, 2, 3, 11), (9, 10, 11)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """`directory(family)`: an export of a tiny base, made once; the base is in `base/` beside it."""
    made = {}

    def make(family):
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            base = save_tiny(family, root / "base")
            made[family] = loopexport.convert(str(base), root / f"looped-{family}", span=SPAN, steps=3).root
        return made[family]

    return make


@pytest.fixture
def load(directory):
    """`load(family, kv="per_step")`: the plain model and the looped one."""

    def make(family, **fields):
        out = directory(family)
        loop = {f"loop_{name}": value for name, value in fields.items()}
        looped = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, **loop).eval()
        return AutoModelForCausalLM.from_pretrained(out.parent / "base").eval(), looped

    return make


def logits(model, tokens, **inputs):
    with torch.no_grad():
        return model(tokens, use_cache=False, **inputs).logits


def in_chunks(model, tokens, cuts, mask=None):
    cache, start, parts = DynamicCache(config=model.config), 0, []
    for stop in cuts:
        seen = None if mask is None else mask[:, :stop]
        positions = torch.arange(start, stop)[None]
        with torch.no_grad():
            out = model(tokens[:, start:stop], past_key_values=cache, position_ids=positions, attention_mask=seen)
        parts.append(out.logits)
        start = stop
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("family", LOOPED)
def test_naive_per_step_is_an_unrolled_model(load, family):
    plain, looped = load(family, kv="per_step", damping=1.0)
    unrolled = unrolled_copy(plain, SPAN, 3)
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    # Sums in grouped matrix products depend on where the experts lie in memory.
    assert_equal = assert_close if family in WITH_EXPERTS else assert_bitwise
    assert_equal(logits(looped, TOKENS), logits(unrolled, TOKENS))
    assert_differs(logits(looped, TOKENS), logits(plain, TOKENS))
    padded = [logits(model, TOKENS, attention_mask=mask) for model in (looped, unrolled)]
    assert_equal(padded[0][mask.bool()], padded[1][mask.bool()])
    cuts = CUTS.get(family, ALL_CUTS)[0]
    assert_close(in_chunks(looped, TOKENS, cuts), in_chunks(unrolled, TOKENS, cuts))
    options = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    assert torch.equal(looped.generate(TOKENS, **options), unrolled.generate(TOKENS, **options))


@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2", "granitemoehybrid"])
def test_a_path_under_per_step_is_an_unrolled_model(load, family):
    plain, looped = load(family, span=None, steps=2, path=PATH, kv="per_step")
    unrolled = unrolled_along(plain, [number for run in PATH for number in range(*run)])
    assert_bitwise(logits(looped, TOKENS), logits(unrolled, TOKENS))
    assert_close(in_chunks(looped, TOKENS, ALL_CUTS[0]), in_chunks(unrolled, TOKENS, ALL_CUTS[0]))


def test_a_layer_without_a_memory_may_be_left_out_though_it_is_the_first_of_its_type(load):
    """The mask of a type is sized by a cache, which an MLP does not have."""
    plain, looped = load("nemotron_h", span=None, steps=2, path=((0, 1), (2, 3), (4, 6)), kv="per_step")
    unrolled = unrolled_along(plain, [0, 2, 4, 5])
    assert_bitwise(logits(looped, TOKENS), logits(unrolled, TOKENS))
    assert_close(in_chunks(looped, TOKENS, ALL_CUTS[0]), in_chunks(unrolled, TOKENS, ALL_CUTS[0]))


@pytest.mark.parametrize(("family", "span"), [("qwen3_5_text", (0, 2)), ("granitemoehybrid", (3, 5)), ("lfm2", (0, 2))])
def test_shared_reads_the_natural_memory_with_own_questions(load, family, span):
    plain, looped = load(family, span=list(span))
    with torch.no_grad():
        by_hand = shared_by_hand(plain, TOKENS, span, 3)
    assert_close(logits(looped, TOKENS), by_hand)
    assert_differs(by_hand, logits(plain, TOKENS))
    assert_close(in_chunks(looped, TOKENS, (5, 6, 11)), by_hand, tolerance=3e-5)


@pytest.mark.parametrize("kv", ["shared", "per_step"])
@pytest.mark.parametrize("family", LOOPED)
def test_chunks_equal_a_full_forward(load, family, kv):
    _, looped = load(family, kv=kv)
    full = logits(looped, TOKENS)
    for cuts in CUTS.get(family, ALL_CUTS):
        assert_close(in_chunks(looped, TOKENS, cuts), full, tolerance=1e-4)


@pytest.mark.parametrize("fields", [{"steps": 1}, {"anchor": 1.0}])
@pytest.mark.parametrize("family", LOOPED)
def test_one_step_and_full_anchor_are_the_base(load, family, fields):
    plain, looped = load(family, **fields)
    assert_bitwise(logits(looped, TOKENS), logits(plain, TOKENS))


def test_left_padding_changes_nothing(load):
    _, looped = load("qwen3_5_text")
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), TOKENS], dim=1)
    mask = (padded != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    ours = logits(looped, padded, attention_mask=mask, position_ids=positions)
    assert_close(ours[:, 3:], logits(looped, TOKENS), tolerance=1e-4)


def test_layer_mode_and_frozen_routing(load):
    fields = {"mode": "layer", "frozen_routing": True, "norm_interpolation": True}
    plain, looped = load("qwen3_next", **fields)
    full = logits(looped, TOKENS)
    assert_differs(full, logits(plain, TOKENS))
    assert_close(in_chunks(looped, TOKENS, (5, 6, 11)), full, tolerance=1e-4)


def test_reference_ends_with_the_natural_states(load):
    """Without a past, each pass has its own chunk alone, as under per_step; the cache keeps the natural states."""
    _, looped = load("qwen3_5_text", kv="per_step")
    own = logits(looped, TOKENS)
    kept = {}
    for kv in ("shared", "reference"):
        looped.config.loop_kv, kept[kv] = kv, DynamicCache(config=looped.config)
        with torch.no_grad():
            first = looped(TOKENS, past_key_values=kept[kv]).logits
            one = looped(TOKENS[:, :1], past_key_values=kept[kv]).logits
        assert one.isfinite().all()
    assert_close(first, own)
    ours, theirs = (kept[kv].layers[SPAN[0]] for kv in ("shared", "reference"))
    assert_bitwise(ours.conv_states[0], theirs.conv_states[0])
    assert_bitwise(ours.recurrent_states[0], theirs.recurrent_states[0])


def test_each_slot_takes_up_the_natural_input_of_a_token_that_skips_the_loop(load):
    """By hand: an unrolled model whose copies get, at that token, the input of the natural layer."""
    plain, looped = load("qwen3_5_text", kv="per_step", decode="bypass", steps=2, damping=1.0)
    ours = in_chunks(looped, TOKENS, (5, 6, 7, 11))
    unrolled = unrolled_copy(plain, SPAN, 2)
    layers, width, natural = unrolled.base_model.layers, SPAN[1] - SPAN[0], {}

    def keep(index):
        def hook(layer, args):
            natural[index] = args[0]

        return hook

    def skip(index):
        def hook(layer, args):
            hidden = args[0].clone()
            hidden[:, 5:7] = natural[index][:, 5:7]
            return (hidden, *args[1:])

        return hook

    for index in range(SPAN[0], SPAN[1] + 1):  # the layer behind the natural pass is the first copy, which gets n
        layers[index].register_forward_pre_hook(keep(index))
    for index in range(SPAN[0], SPAN[1] + 1):
        layers[index + width].register_forward_pre_hook(skip(index))
    assert_close(ours, logits(unrolled, TOKENS), tolerance=3e-5)
    assert_differs(ours, logits(looped, TOKENS))


def test_copies_pickles_and_saved_models_compute_the_same(load, tmp_path):
    _, looped = load("lfm2")
    want = logits(looped, TOKENS)
    buffer = io.BytesIO()
    torch.save(looped, buffer)
    buffer.seek(0)
    looped.save_pretrained(tmp_path / "saved_lfm2")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved_lfm2", trust_remote_code=True).eval()
    for model in (copy.deepcopy(looped), torch.load(buffer, weights_only=False), saved):
        assert_bitwise(logits(model, TOKENS), want)


def test_threads_share_a_model(load):
    _, looped = load("lfm2")
    prompts = [tiny_tokens(1, 8, seed) for seed in range(8)]
    want = [logits(looped, each) for each in prompts]
    with ThreadPoolExecutor(4) as pool:
        for ours, theirs in zip(pool.map(lambda each: logits(looped, each), prompts), want, strict=True):
            assert_close(ours, theirs)


def test_compiled_shared_equals_eager(tmp_path):
    """Under torch.compile too, a mixer gets our kernels and not the native module's."""
    types = ["linear_attention", "full_attention"]
    base = save_tiny("granitemoehybrid", tmp_path / "base", num_hidden_layers=2, layer_types=types)
    out = loopexport.convert(str(base), tmp_path / "compiled", span=(0, 1), steps=2).root
    looped = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
    want = logits(looped, TOKENS)
    torch._dynamo.reset()
    assert_close(logits(torch.compile(looped, fullgraph=True, backend="aot_eager"), TOKENS), want)
    looped.config.loop_kv = "per_step"
    assert_differs(logits(looped, TOKENS), want)  # the native kernels' answer


def test_gradient_checkpointing_is_exact_or_refused(load):
    _, looped = load("lfm2", kv="per_step")
    looped.train()

    def gradients():
        looped.zero_grad()
        looped(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        return torch.cat([each.grad.flatten() for each in looped.parameters() if each.grad is not None])

    want = gradients()
    looped.gradient_checkpointing_enable()
    assert_close(gradients(), want)
    looped.config.loop_kv = "shared"
    with pytest.raises(ValueError, match="kv shared over recurrent layers does not work with gradient checkpointing"):
        gradients()


def test_state_outside_of_the_cache_is_refused(load):
    with pytest.raises(
        ValueError, match="cannot loop layer 1: MiniMaxLightningAttention keeps a recurrent state where"
    ):
        load("minimax")


def test_mixer_that_somebody_else_computes_is_refused_under_shared(load):
    plain, looped = load("lfm2")
    mixer = looped.model.layers[1].conv
    mixer.forward = type(mixer).forward.__get__(mixer)
    with pytest.raises(ValueError, match="saw 0 convolutions and 0 scans in conv"):
        logits(looped, TOKENS)
    looped.config.loop_kv, looped.config.loop_damping = "per_step", 1.0
    assert_bitwise(logits(looped, TOKENS), logits(unrolled_copy(plain, SPAN, 3), TOKENS))
