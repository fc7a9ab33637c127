"""Multimodal checkpoints: what their configs and the names of their tensors say about the language model."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

import loopexport
from loopexport.base import families, loadable
from loopexport.base.checkpoint import open_checkpoint
from loopexport.base.tensor_names import is_tower, layer_of, layers_path
from loopexport.errors import CheckpointError
from support.damage import edit_config
from support.multimodal import NUM_LAYERS, save_multimodal

VISION = {"vision_config": {"num_hidden_layers": 9}}
GEMMA = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], **VISION}
LLAMA = {"model_type": "llama", "num_hidden_layers": 4}

# Names of layers in published checkpoints, with the path of their list; None for a tower.
LAYER_NAMES = {
    "model.language_model.layers.3.mlp.up_proj.weight": "model.language_model.layers",
    "language_model.model.layers.3.mlp.up_proj.weight": "language_model.model.layers",
    "model.layers.3.mlp.up_proj.weight": "model.layers",
    "model.text_model.layers.3.mlp.up_proj.weight": "model.text_model.layers",
    "text_model.model.layers.3.fc1.weight": "text_model.model.layers",
    "model.llm.layers.3.mlp.up_proj.weight": "model.llm.layers",
    "language_model.model.decoder.layers.3.fc1.weight": "language_model.model.decoder.layers",
    "vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight": None,
    "model.vision_tower.transformer.layers.3.feed_forward.up_proj.weight": None,
    "visual.blocks.3.mlp.fc1.weight": None,
    "model.visual.blocks.3.attn.qkv.weight": None,
    "audio_tower.layers.3.fc1.weight": None,
    "vision_model.model.layers.3.mlp.fc1.weight": None,
    "image_tower.encoder.layers.3.mlp.fc1.weight": None,
    "model.connector.perceiver_resampler.layers.3.mlp.up_proj.weight": None,
    "qformer.encoder.layer.3.attention.output.dense.weight": None,
    "encoder.layers.3.conv.up_conv.weight": None,
    "model.embed_tokens_extend.image_embed.img_processor.encoder.layers.3.mlp.fc1.weight": None,
}


@pytest.fixture
def base(tmp_path):
    return save_multimodal("gemma3", tmp_path / "base")


def rename(root, change):
    """Rename each tensor by `change`; drop those for which it returns None."""
    path = root / "model.safetensors"
    tensors = {change(name): tensor for name, tensor in load_file(path).items()}
    tensors.pop(None, None)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(("name", "path"), LAYER_NAMES.items())
def test_layers_of_towers_are_no_decoder_layers(name, path):
    assert layers_path(name) == path
    assert layer_of(name) == (None if path is None else 3)
    assert is_tower(name) == (path is None)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({**GEMMA, "text_config": LLAMA}, 4),
        ({**GEMMA, "num_hidden_layers": 7}, 7),  # Qwen2.5-VL has the fields of its language model on top
        ({**GEMMA, "text_config": {"layer_types": ["full_attention"] * 5}}, 5),
        ({**GEMMA, "text_config": {"model_type": "llama"}}, 32),  # LLaVA 1.5 leaves out what Llama has by default
        ({**GEMMA, "text_config": {"model_type": "unknown"}}, None),
        ({**GEMMA, "text_config": {}, "num_hidden_layers": 7}, None),
    ],
)
def test_layers_are_counted_in_the_language_model(config, count):
    assert families.is_multimodal(config)
    assert families.layer_count(config) == count


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"text_config": {**LLAMA, "is_encoder_decoder": True}}, "is an encoder-decoder"),
        ({"text_config": {"model_type": "bart", "decoder_layers": 3}}, "half of an encoder-decoder"),
        ({"text_config": LLAMA, "is_encoder_decoder": True}, "is an encoder-decoder"),
        ({"text_config": LLAMA, "model_type": "clip", "architectures": ["CLIPModel"]}, "no class of clip that"),
        ({"text_config": LLAMA, "architectures": ["Gemma3ForSequenceClassification"]}, "ForConditionalGeneration with"),
        ({"text_config": {"model_type": "unknown"}}, "gives no number of layers"),
        ({"thinker_config": {"text_config": LLAMA}}, "only a checkpoint of its thinker alone"),
        ({"text_config": LLAMA, "model_type": "no_such_vl"}, "no model family 'no_such_vl'"),
    ],
)
def test_multimodal_models_without_a_decoder_to_loop_are_refused(config, says):
    with pytest.raises(CheckpointError, match=says):
        families.check_family({**GEMMA, **config})


def test_refusals_on_record_hold_for_multimodal_families(monkeypatch):
    monkeypatch.setattr(families, "outcomes", lambda: {"gemma3": {"5.24": "refused: for a test"}})
    with pytest.raises(CheckpointError, match="'gemma3' cannot be looped: for a test"):
        families.check_family({**GEMMA, "text_config": LLAMA})


def test_text_models_with_a_tower_config_stay_text_models():
    config = {"architectures": ["Phi4MultimodalForCausalLM"], **VISION}
    assert not families.is_multimodal(config)
    assert families.is_language_model(config)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda name: name.replace("language_model.model.", "model.language_model."), None),
        (lambda name: name.replace("language_model.model.", "model."), "of a language model alone, but gemma3"),
        (lambda name: None if "vision" in name or "projector" in name else name, "have no vision tower"),
        (lambda name: None if "language_model.model.layers" in name else name, "the weights have no layers"),
        (lambda name: None if "language_model.model.layers.4." in name else name, "says 6 layers, but .* layer 4"),
        (lambda name: None if "language_model.model.embed" in name else name, "no token embeddings"),
        (lambda name: None if name == "language_model.model.norm.weight" else name, "no final norm"),
    ],
)
def test_names_of_multimodal_weights_are_checked(base, change, says, monkeypatch):
    monkeypatch.setattr(loadable, "newest_outcome", lambda model_type: ("works", ""))
    rename(base, change)
    if says is None:
        assert open_checkpoint(base).num_layers == NUM_LAYERS
        return
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(base)
    assert AutoModelForImageTextToText.from_pretrained(base, output_loading_info=True)[1]["missing_keys"]


def test_head_of_an_untied_language_model_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(loadable, "newest_outcome", lambda model_type: ("works", ""))
    base = save_multimodal("llava", tmp_path / "base")
    edit_config(base, tie_word_embeddings=False)  # transformers 4 leaves it out
    assert open_checkpoint(base)
    rename(base, lambda name: None if "lm_head" in name else name)
    with pytest.raises(CheckpointError, match="have no head"):
        open_checkpoint(base)


@pytest.mark.parametrize(
    ("family", "top", "text", "tied"),
    [
        ("gemma3", False, True, False),
        ("gemma3", True, False, True),
        ("gemma3", None, False, False),
        ("llava", False, True, True),
    ],
)
def test_top_config_says_whether_the_head_is_tied(family, top, text, tied):
    config = {"model_type": family, "tie_word_embeddings": top, "text_config": {"tie_word_embeddings": text}}
    assert loadable.is_tied(config) is tied


def test_span_counts_the_layers_of_the_language_model(base):
    assert loopexport.plan_convert(base, span=(4, NUM_LAYERS), steps=2, dry_run=True)
    with pytest.raises(loopexport.LoopExportError, match="6 layers"):
        loopexport.plan_convert(base, span=(4, NUM_LAYERS + 1), steps=2, dry_run=True)


def test_recurrent_layers_of_a_language_model_are_known(tmp_path):
    if "qwen3_5" not in CONFIG_MAPPING:
        pytest.skip("qwen3_5 came with transformers 5")
    root = save_multimodal("qwen3_5", tmp_path / "base")
    assert set(open_checkpoint(root).recurrent_tensors) == {0, 1, 3, 4}
    config = json.loads((root / "config.json").read_text())
    assert families.layer_types(config) == config["text_config"]["layer_types"]
