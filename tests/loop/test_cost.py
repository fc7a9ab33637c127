"""What a loop is said to cost, against numbers worked out by hand, real models and what real caches hold."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Cache, DynamicCache

import loopexport
from loopexport.base import families
from loopexport.onnx.limits import check_memory
from support.commands import run
from support.family_walk import RELEASE, save_tiny_family
from support.multimodal import save_multimodal
from support.structure import by_class
from support.tiny import FAMILIES, INDEXED, MOE_FAMILIES, NUM_LAYERS, SPAN, tiny_tokens

FP32 = 4  # bytes
LOOP = {"span": SPAN, "steps": 3}  # layers 1, 2 and 3 run three times
ATTENTION_WITH_GQA = 64 * 64 + 2 * 64 * 32 + 64 * 64  # q, k and v of two heads of 16, o


def cost(base, **spec):
    return loopexport.plan_convert(str(base), **{**LOOP, **spec}).cost


def edit_config(base, **changes):
    config = json.loads((base / "config.json").read_text())
    config = {key: value for key, value in {**config, **changes}.items() if value is not None}
    (base / "config.json").write_text(json.dumps(config))


# ---------------------------------------------------------------------------------------------------------------------
# Weights, by hand: hidden 64, vocabulary 131, six layers.
# ---------------------------------------------------------------------------------------------------------------------


def test_dense_layers_are_read_as_often_as_they_run(tiny_base):
    layer = ATTENTION_WITH_GQA + 3 * 64 * 96 + 2 * 64
    outside = 64 + 131 * 64 + 64  # one row of the embedding, the head, the norm
    found = cost(tiny_base("llama"))
    assert (found.base_layer_evaluations, found.layer_evaluations) == (6, 12)
    assert found.base_params_read == 6 * layer + outside
    assert found.params_read == 12 * layer + outside
    assert (found.base_bytes_read, found.bytes_read) == (FP32 * found.base_params_read, FP32 * found.params_read)


@pytest.mark.parametrize("kind", ["llava", "gemma3"])
def test_multimodal_models_cost_what_their_language_models_cost(kind, tmp_path):
    """Neither the towers nor their layers count, however many there are."""
    found = cost(save_multimodal(kind, tmp_path / "base"))
    layer = ATTENTION_WITH_GQA + 3 * 64 * 96 + 2 * 64
    more = {"llava": 64 + 131 * 64 + 64, "gemma3": 131 * 64 + 64 + 6 * (2 * 64 + 2 * 16)}[kind]  # gemma3 is tied
    assert found.base_params_read == 6 * layer + more
    assert (found.base_layer_evaluations, found.layer_evaluations) == (6, 12)
    assert found.kv_bytes == found.base_kv_bytes == 6 * 2 * 2 * 16 * FP32


@pytest.mark.parametrize(("rule", "per_step"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
@pytest.mark.parametrize("mode", ["block", "layer"])
def test_layers_run_are_those_of_the_formula(tiny_base, rule, per_step, mode):
    found = cost(tiny_base("llama"), rule=rule, steps=4, mode=mode)
    assert found.layer_evaluations == 6 + (per_step * 4 - 1) * 3  # L + (E K - 1) w


def test_embedding_is_read_whole_where_it_is_the_head(tiny_base):
    layer = ATTENTION_WITH_GQA + 3 * 64 * 96 + 2 * 64 + 64 + 2 * 32  # biases of q, k and v
    assert cost(tiny_base("qwen2")).base_params_read == 6 * layer + 131 * 64 + 64


def test_position_table_is_read_by_the_row(tiny_base):
    """GPT-2: the embedding is the head, positions have a table of 128 rows, everything has a bias."""
    layer = 64 * 192 + 192 + 64 * 64 + 64 + 2 * 64 * 96 + 96 + 64 + 4 * 64
    assert cost(tiny_base("gpt2")).base_params_read == 6 * layer + 131 * 64 + 64 + 2 * 64


def test_head_and_embedding_are_told_apart_by_other_names(tiny_base):
    """GPT-NeoX: embed_in, and a head called embed_out in its files."""
    layer = 64 * 192 + 192 + 64 * 64 + 64 + 2 * 64 * 96 + 96 + 64 + 4 * 64
    assert cost(tiny_base("gpt_neox")).base_params_read == 6 * layer + 64 + 131 * 64 + 2 * 64


def test_a_token_reads_the_experts_it_is_sent_to_and_no_others(tiny_base):
    """Qwen2-MoE: 2 of 4 experts in every layer but the second, and a shared expert behind a gate."""
    attention = ATTENTION_WITH_GQA + 64 + 2 * 32 + 2 * 64  # biases, norms
    dense = attention + 3 * 64 * 96
    sparse = attention + 2 * (3 * 64 * 48) + 4 * 64 + 3 * 64 * 40 + 64
    outside = 64 + 131 * 64 + 64
    found = cost(tiny_base("qwen2_moe"))
    assert found.base_params_read == dense + 5 * sparse + outside
    assert found.params_read == 3 * dense + (3 + 6) * sparse + outside
    assert found.bytes_read == FP32 * found.params_read


def test_fused_experts_count_as_separate_ones_do(tiny_base):
    """gpt-oss keeps each projection of all experts, and its bias, in one tensor."""
    attention = ATTENTION_WITH_GQA + 2 * 64 + 2 * 32 + 4  # biases and sinks
    sparse = attention + 2 * (64 * 192 + 192 + 96 * 64 + 64) + 4 * 64 + 4 + 2 * 64
    assert cost(tiny_base("gpt_oss")).base_params_read == 6 * sparse + 64 + 131 * 64 + 64


def test_fused_experts_are_known_by_their_shape_too(tiny_base, tmp_path):
    """Granite-MoE's files call them `input_linear`; only their first dimension tells."""
    base = save_tiny_family("granitemoe", tmp_path / "base")
    names = [name for name, tensor in load_file(base / "model.safetensors").items() if tensor.dim() == 3]
    assert names
    assert not any(".experts." in name for name in names)
    layer = 64 * 64 * 2 + 2 * 64 * 32 + 2 * (3 * 64 * 96) + 4 * 64 + 2 * 64
    tied = json.loads((base / "config.json").read_text())["tie_word_embeddings"]
    assert cost(base).base_params_read == 6 * layer + 131 * 64 + 64 + (0 if tied else 64)


def test_unknown_number_of_active_experts_is_not_guessed(tiny_base, tmp_path):
    base = copied(tiny_base("qwen3_moe"), tmp_path)
    edit_config(base, num_experts_per_tok=None)
    found = cost(base)
    assert (found.params_read, found.bytes_read) == (None, None)
    assert (
        "bytes of weights read a token: unknown"
        in run("convert", base, "out", "--span", "1:4", "--steps", 3, "--dry-run").stdout
    )


def copied(base, directory, add=None):
    """A copy of a base, with further tensors."""
    out = directory / "copy"
    out.mkdir()
    (out / "config.json").write_bytes((base / "config.json").read_bytes())
    tensors = {**load_file(base / "model.safetensors"), **(add or {})}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("name", ["model.layers.6.mlp.up_proj.weight", "mtp.layers.0.mlp.up_proj.weight"])
def test_layers_for_multi_token_prediction_are_not_read(tiny_base, tmp_path, name):
    base = tiny_base("deepseek_v3")
    assert cost(copied(base, tmp_path, {name: torch.zeros(64, 96)})) == cost(base)


# ---------------------------------------------------------------------------------------------------------------------
# Against real models.
# ---------------------------------------------------------------------------------------------------------------------


def base_params_by_modules(model, active: float) -> float:
    """Parameters that one token reads, counted from the model's modules instead of names and shapes in a file."""
    head = model.get_output_embeddings()
    total, seen = 0.0, set()
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:
                continue
            is_table = isinstance(module, torch.nn.Embedding) and (head is None or head.weight is not module.weight)
            share = 1 / len(parameter) if is_table else 1
            total += parameter.numel() * (active if f".{path}.".find(".experts.") >= 0 else share)
            seen.add(id(parameter))
    return total


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_read_are_those_of_the_model(tiny_base, plain, family):
    active = 2 / 4 if family in MOE_FAMILIES else 1
    buffers = sum(tensor.numel() for name, tensor in plain(family).state_dict().items() if "correction_bias" in name)
    assert cost(tiny_base(family)).base_params_read == base_params_by_modules(plain(family), active) + buffers


def cache_bytes_a_token(model, tokens) -> int:
    """What a real cache holds after a forward over `tokens`, by token."""
    with torch.no_grad():
        cache = model(tokens, past_key_values=DynamicCache(config=model.config), use_cache=True).past_key_values
    names = ("keys", "values", "indexer_keys")
    held = [getattr(layer, name, None) for layer in cache.layers for name in names]
    return sum(each.nbytes for each in held if each is not None) // tokens.numel()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv", ["shared", "per_step"])
def test_kv_bytes_are_those_of_a_real_cache(tiny_base, looped, plain, family, kv):
    tokens = tiny_tokens(1, 5)  # shorter than any window
    found = cost(tiny_base(family), kv=kv)
    assert found.base_kv_bytes == cache_bytes_a_token(plain(family), tokens)
    assert found.kv_bytes == cache_bytes_a_token(looped(family, kv=kv), tokens)


@pytest.mark.skipif(not hasattr(Cache, "update_indexer"), reason="this release has no indexed attention")
@pytest.mark.parametrize("family", by_class(INDEXED, ("glm_moe_dsa",)))
def test_kv_bytes_have_the_keys_of_an_indexer(tiny_base, looped, plain, family):
    test_kv_bytes_are_those_of_a_real_cache(tiny_base, looped, plain, family, "per_step")


def test_kv_bytes_by_hand(tiny_base):
    found = cost(tiny_base("llama"), kv="per_step")
    assert found.base_kv_bytes == NUM_LAYERS * 2 * 2 * 16 * FP32
    assert found.kv_bytes == (NUM_LAYERS + 2 * 3) * 2 * 2 * 16 * FP32


def test_latent_attention_keeps_latents_or_by_the_release_all_heads(tiny_base):
    latent, expanded = 24 + 8, 4 * (16 + 8 + 12)
    release = tuple(map(int, RELEASE.split(".")))
    if release == (4, 57):
        assert cost(tiny_base("deepseek_v3")).base_kv_bytes == NUM_LAYERS * expanded * FP32
    if release >= (5, 15):
        assert cost(tiny_base("deepseek_v3")).base_kv_bytes == NUM_LAYERS * latent * FP32


def test_kv_heads_that_differ_by_layer_are_counted_where_weights_show_them(tiny_base, tmp_path):
    """Layer 1 with 8 rows of keys instead of 32; quantised tensors do not show their rows."""
    base = copied(tiny_base("llama"), tmp_path, {"model.layers.1.self_attn.k_proj.weight": torch.zeros(8, 64)})
    edit_config(base, global_head_dim=8)
    assert cost(base).base_kv_bytes == (NUM_LAYERS * 64 - 24) * FP32
    edit_config(base, quantization_config={"quant_method": "gptq"})
    assert cost(base).base_kv_bytes is None


def test_layers_without_keys_and_values_add_none(tmp_path):
    """Linear attention in three of four layers."""
    base = save_tiny_family("qwen3_next", tmp_path / "base")
    edit_config(base, layer_types=["linear_attention"] * 3 + ["full_attention"] + ["linear_attention"] * 2)
    assert cost(base, span=(3, 4)).base_kv_bytes == 2 * 2 * 16 * FP32
    edit_config(base, layer_types=["unheard_of"] * 3 + ["full_attention"] + ["linear_attention"] * 2)
    assert cost(base, span=(3, 4)).base_kv_bytes is None


@pytest.mark.matrix
@pytest.mark.parametrize("family", [name for name, each in families.outcomes().items() if families.READS not in each])
def test_kv_bytes_of_every_family_are_right_or_left_open(tmp_path, family):
    """Never a wrong number; None only where layers keep something that the config does not size."""
    outcome = families.outcomes()[family].get(RELEASE, "")
    if not outcome.startswith(("works", "in part")):
        pytest.skip(outcome or "unknown to this release")
    base = save_tiny_family(family, tmp_path / "base")
    try:
        spec = next(spec for spec in ((start, start + 1) for start in range(6)) if is_allowed(base, spec))
        found = cost(base, span=spec).base_kv_bytes
        model = AutoModelForCausalLM.from_pretrained(base).eval()
        real = cache_bytes_a_token(model, tiny_tokens(1, 5))
    except (AttributeError, StopIteration, ValueError) as error:
        pytest.skip(f"no stock cache to compare with: {error}")
    assert found == real or (found is None and (keeps_a_state(model.config) or not outcome.startswith("works")))


def keeps_a_state(config) -> bool:
    """Whether a layer keeps more than keys and values."""
    try:
        check_memory(config)
    except loopexport.LoopExportError:
        return True
    return False


def is_allowed(base, span) -> bool:
    try:
        cost(base, span=span)
    except loopexport.LoopExportError:
        return False
    return True
