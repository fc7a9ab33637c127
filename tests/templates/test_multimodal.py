"""Multimodal models loop in their language model, with a picture in the prompt."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache

import loopexport
from loopexport.loop.spec import KV_POLICIES, MODES
from support.compare import assert_bitwise, assert_close, assert_differs
from support.loaded_code import code_beside
from support.multimodal import for_longer, image_prompt, save_multimodal
from support.oracle import Oracle
from support.tiny import SPAN, tiny_tokens

# One for each way in which a picture reaches the layers: masks, positions, embeddings.
KINDS = ("gemma3", "qwen2_5_vl", "mistral3")
# Each kind under the default, and every policy and mode with the masks of Gemma 3.
CELLS = [(kind, "shared", "block") for kind in KINDS[1:]] + [
    ("gemma3", kv, mode) for kv in KV_POLICIES for mode in MODES
]
STEPS = 3  # decode steps after the prompt
IS_VERSION_4 = int(transformers.__version__.partition(".")[0]) < 5


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    """`base_dir(kind)`: the directory of a tiny base."""
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = save_multimodal(kind, tmp_path_factory.mktemp("base") / kind)
        return made[kind]

    return make


@pytest.fixture(scope="module")
def export_dir(base_dir, tmp_path_factory):
    """`export_dir(kind)`: the directory of its export."""
    made = {}

    def make(kind):
        if kind not in made:
            out = tmp_path_factory.mktemp("export") / kind
            span = (2, 5) if kind == "qwen3_vl" else SPAN  # its first two layers get features of images
            made[kind] = loopexport.convert(str(base_dir(kind)), out, weights="copy", span=span, steps=3).root
        return made[kind]

    return make


@pytest.fixture
def plain(base_dir):
    """`plain(kind)`: the tiny base, loaded."""
    return lambda kind: AutoModelForImageTextToText.from_pretrained(base_dir(kind)).eval()


@pytest.fixture
def looped(export_dir):
    """`looped(kind, **spec)`: the export, loaded with fields of the loop."""

    def make(kind, **spec):
        fields = {f"loop_{name}": value for name, value in spec.items()}
        return AutoModelForImageTextToText.from_pretrained(export_dir(kind), trust_remote_code=True, **fields).eval()

    return make


def prompt_and_answer(kind, batch=2, pictures=1):
    """The inputs of a prompt with pictures, and its token ids with those of an answer."""
    inputs = image_prompt(kind, batch, pictures)
    return inputs, torch.cat([inputs["input_ids"], tiny_tokens(batch, STEPS, seed=5).clamp(max=120)], dim=1)


def in_steps(model, inputs, tokens):
    """Logits of a prompt with pictures and then of one token after the other, `(batch, seq, vocab)`."""
    cache, logits, start = DynamicCache(config=model.config), [], inputs["input_ids"].shape[1]
    with torch.no_grad():
        logits.append(model(**inputs, past_key_values=cache, use_cache=True).logits)
        for position in range(start, tokens.shape[1]):  # no mask: Qwen-VL would take its positions from it
            place = {"cache_position": torch.tensor([position])} if IS_VERSION_4 else {}
            step = model(tokens[:, position : position + 1], past_key_values=cache, use_cache=True, **place)
            logits.append(step.logits)
    return torch.cat(logits, dim=1)


def at_once(model, kind, inputs, tokens):
    """Logits of one forward without a cache, `(batch, seq, vocab)`."""
    with torch.no_grad():
        return model(**for_longer(kind, inputs, tokens), use_cache=False).logits


@pytest.mark.parametrize(("kind", "kv", "mode"), CELLS)
def test_prompts_with_pictures_equal_the_oracle(looped, plain, kind, kv, mode):
    spec = {"steps": 3, "anchor": 0.25, "kv": kv, "mode": mode}
    inputs, tokens = prompt_and_answer(kind)
    base = plain(kind)
    oracle = Oracle(base, SPAN, inputs=lambda tokens: for_longer(kind, inputs, tokens), **spec)
    with torch.no_grad():
        theirs = oracle.logits(tokens, [inputs["input_ids"].shape[1], *[1] * STEPS])
    ours = in_steps(looped(kind, **spec), inputs, tokens)
    assert_close(ours, theirs)
    assert_differs(ours, at_once(base, kind, inputs, tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_the_picture_reaches_the_loop(looped, kind):
    model = looped(kind)
    inputs, tokens = prompt_and_answer(kind)
    other = inputs | {"pixel_values": inputs["pixel_values"].flip(0) + 1}
    assert_differs(at_once(model, kind, other, tokens), at_once(model, kind, inputs, tokens))


@pytest.mark.parametrize("field", [{"steps": 1}, {"anchor": 1.0}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_identities_are_bitwise_the_base(looped, plain, kind, field):
    inputs, tokens = prompt_and_answer(kind)
    ours = in_steps(looped(kind, **field), inputs, tokens)
    assert_bitwise(ours, in_steps(plain(kind), inputs, tokens))


@pytest.mark.parametrize("kv", ["shared", "per_step"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_pictures_in_each_row_decode_as_a_full_forward(looped, kind, kv):
    model = looped(kind, kv=kv)
    inputs, tokens = prompt_and_answer(kind, pictures=2)
    assert_close(in_steps(model, inputs, tokens), at_once(model, kind, inputs, tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_generate_equals_full_forwards(looped, kind):
    model, inputs = looped(kind), image_prompt(kind)
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    greedy = at_once(model, kind, inputs, tokens)[:, -5:-1].argmax(dim=-1)
    assert torch.equal(tokens[:, -4:], greedy)


@pytest.mark.parametrize("kind", KINDS)
def test_left_padding_changes_nothing(looped, kind):
    model, inputs = looped(kind), image_prompt(kind)
    ids = torch.cat([torch.zeros(1, 3, dtype=torch.long), inputs["input_ids"]], dim=1)
    padded = for_longer(kind, inputs, ids)
    padded["attention_mask"][:, :3] = 0
    with torch.no_grad():
        assert_close(model(**padded).logits[:, 3:], model(**inputs).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_text_alone_is_the_text_of_the_language_model(looped, plain, kind):
    spec = {"steps": 3, "kv": "shared"}
    tokens = tiny_tokens(2, 9).clamp(max=120)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with torch.no_grad():
        theirs = Oracle(plain(kind), SPAN, **spec).logits(tokens, [9])
        ours = looped(kind, **spec)(**inputs).logits
    assert_close(ours, theirs)


def test_every_auto_class_of_the_base_loads(export_dir, plain):
    root = export_dir("gemma3")
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
        model, report = auto.from_pretrained(root, trust_remote_code=True, output_loading_info=True)
        assert not any(report.values()), (auto, report)
        assert type(model).__name__.startswith("LoopedGemma3")
    native = dict(plain("gemma3").named_parameters())
    assert native.keys() == dict(model.named_parameters()).keys()


def test_an_auto_class_that_the_base_lacks_is_refused_by_name(export_dir):
    with pytest.raises(AttributeError, match="use AutoModel or AutoModelForImageTextToText"):
        AutoModelForCausalLM.from_pretrained(export_dir("qwen2_5_vl"), trust_remote_code=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_copy_is_complete(looped, kind, tmp_path):
    model = looped(kind)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == f"looped_{kind}"
    assert config["loop_steps"] == 3
    assert not any(name.startswith("loop_") for name in config["text_config"])
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True).eval()
    inputs, tokens = prompt_and_answer(kind)
    assert_bitwise(at_once(again, kind, inputs, tokens), at_once(model, kind, inputs, tokens))


def test_the_loop_is_in_the_language_model_alone(looped):
    """The vision tower has as many layers."""
    model = looped("gemma3")
    towers = [path for path, module in model.named_modules() if "_loop" in vars(module)]
    assert [path.rpartition(".")[2] for path in towers] == ["language_model"]


def test_a_span_beyond_the_language_model_is_refused(export_dir):
    with pytest.raises(ValueError, match="span 4:9 ends outside the model, which has 6 layers"):
        AutoModelForImageTextToText.from_pretrained(export_dir("gemma3"), trust_remote_code=True, loop_span=[4, 9])


def test_fields_of_the_loop_are_on_top(export_dir):
    config = AutoConfig.from_pretrained(export_dir("gemma3"), trust_remote_code=True, loop_steps=2)
    assert config.loop_steps == 2
    assert not hasattr(config.text_config, "loop_steps")


# Qwen3-VL adds features of the picture to the outputs of its first layers, two in our tiny model.


def test_a_span_behind_the_added_features_equals_the_oracle(looped, plain):
    spec = {"span": (2, 5), "steps": 3}
    inputs, tokens = prompt_and_answer("qwen3_vl")
    oracle = Oracle(plain("qwen3_vl"), inputs=lambda tokens: for_longer("qwen3_vl", inputs, tokens), **spec)
    with torch.no_grad():
        theirs = oracle.logits(tokens, [inputs["input_ids"].shape[1], *[1] * STEPS])
    assert_close(in_steps(looped("qwen3_vl", span=[2, 5]), inputs, tokens), theirs)


def test_layer_mode_loops_layers_whose_outputs_get_features(looped, plain):
    base, (inputs, tokens) = plain("qwen3_vl"), prompt_and_answer("qwen3_vl")
    for layer in base.model.language_model.layers[:3]:
        layer.register_forward_hook(twice, with_kwargs=True)
    theirs = at_once(base, "qwen3_vl", inputs, tokens)
    model = looped("qwen3_vl", span=[0, 3], mode="layer", kv="per_step", steps=2, damping=1.0)
    assert_close(at_once(model, "qwen3_vl", inputs, tokens), theirs)


def twice(layer, args, kwargs, output):
    """A hook: the layer's output for its own output, which is naive looping without a cache."""
    return layer.forward(output, *args[1:], **kwargs)


@pytest.mark.parametrize("span", [[0, 2], [1, 4]], ids=str)
def test_block_mode_refuses_features_inside_a_span(looped, span):
    with pytest.raises(
        ValueError, match=r"after each of its first 2 layers, and layers .* loop together; .*starts at 2, or mode layer"
    ):
        looped("qwen3_vl", span=span)


@pytest.mark.skipif(IS_VERSION_4, reason="transformers 4 adds them in place, which leaves no sign")
def test_features_that_the_config_does_not_announce_are_refused(looped, monkeypatch):
    model = looped("qwen3_vl", span=[2, 5])
    monkeypatch.setattr(code_beside(model, "looped_decoder"), "ADDED_FEATURES", "unknown to us")
    model.config.loop_span = [1, 4]
    inputs = image_prompt("qwen3_vl")
    with pytest.raises(ValueError, match="changes the hidden states between layers 1 and 2, inside a span"):
        model(**inputs)
    model(inputs["input_ids"][:, :4])  # without a picture there is nothing to add
