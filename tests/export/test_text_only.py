"""`convert --text-only`: the language model of a multimodal checkpoint, byte for byte, and nothing else."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

import loopexport
from loopexport.base.checkpoint import Origin
from loopexport.base.language_model import language_model_config, native_names
from loopexport.errors import CheckpointError, OutputError, SpecError
from loopexport.export.card import read_metadata
from loopexport.loop.presets import find_preset, published_cell
from support.commands import run, sha256
from support.compare import assert_bitwise
from support.damage import edit_config
from support.multimodal import multimodal_model, save_multimodal
from support.tiny import save_tiny, tiny_tokens

LOOP = {"span": (2, 3), "steps": 2}
TEXT_TYPES = {"gemma3": "gemma3_text", "mistral3": "mistral", "llava": "llama", "qwen3_5": "qwen3_5_text"}
SHARDS = {"max_shard_size": "300KB"}
TOKENS = tiny_tokens(2, 9)


def save(kind, root, **options):
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    multimodal_model(kind).save_pretrained(root, **options)
    return root


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return save_multimodal("llava", tmp_path_factory.mktemp("text_only") / "llava")


@pytest.fixture
def base(llava, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(llava, tmp_path / "base")


def whole_answer(kind):
    """What the multimodal model says to text."""
    more = {"token_type_ids": torch.zeros_like(TOKENS)} if kind == "gemma3" else {}
    with torch.no_grad():
        return multimodal_model(kind)(input_ids=TOKENS, **more).logits


def text_answer(root, **options):
    """What a causal language model says to text; all of its weights were loaded, and no others."""
    model, loading = AutoModelForCausalLM.from_pretrained(
        root, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def tensors(root):
    return {name: tensor for path in root.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("options", [{}, SHARDS], ids=["one file", "shards"])
@pytest.mark.parametrize("kind", TEXT_TYPES)
def test_text_only_export_says_what_the_multimodal_model_says_to_text(kind, options, tmp_path):
    base = save(kind, tmp_path / "base", **options)
    export = loopexport.convert(base, tmp_path / "out", text_only=True, **LOOP)
    config = json.loads((export.root / "config.json").read_text())
    assert config["model_type"] == f"looped_{TEXT_TYPES[kind]}"
    assert not {"text_config", "vision_config"} & set(config)
    assert export.manifest.text_only
    whole = whole_answer(kind)
    assert_bitwise(text_answer(export.root, loop_steps=1), whole)
    assert not torch.equal(text_answer(export.root), whole)
    restored = loopexport.restore(export.root, tmp_path / "restored").root
    assert_bitwise(text_answer(restored), whole)


def test_tensors_keep_their_bytes_and_lose_the_name_of_the_part(llava, tmp_path):
    out = loopexport.convert(llava, tmp_path / "out", text_only=True, **LOOP).root
    old, new = tensors(llava), tensors(out)
    assert set(new) == {name.removeprefix("language_model.") for name in old if name.startswith("language_model.")}
    assert all(torch.equal(tensor, old[f"language_model.{name}"]) for name, tensor in new.items())
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_files_that_the_text_family_reads_are_shared_and_the_others_rewritten(tmp_path):
    base = save("qwen3_5", tmp_path / "base", **SHARDS)
    first = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    vision, *pure = sorted(set(first.values()))
    lost = load_file(base / vision)
    mixed = {**load_file(base / pure[0]), **dict(list(lost.items())[:1])}  # one tensor of the tower among the layers
    save_file(mixed, base / pure[0], metadata={"format": "pt"})
    save_file(dict(list(lost.items())[1:]), base / vision, metadata={"format": "pt"})
    index = {name: pure[0] if name in mixed else file for name, file in first.items()}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))

    plan = loopexport.plan_convert(base, tmp_path / "out", text_only=True, weights="hardlink", **LOOP)
    told = plan.to_dict()
    assert told["text_only"]
    assert told["weights"]["rewritten"] == [pure[0]]
    assert vision in told["left_behind"]
    assert told["weights"]["max_disk_bytes"] == (size := next(s.size for s in plan.base.shards if s.name == pure[0]))
    copied = []
    out = plan.apply(copied.append).root
    assert 0 < size - sum(copied) < 10_000  # all but the header
    assert (out / pure[0]).stat().st_size == size
    assert all((out / name).samefile(base / name) for name in pure[1:])
    assert not (out / vision).exists()
    kept = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert kept == {name: file for name, file in index.items() if "visual" not in name}
    assert_bitwise(text_answer(out, loop_steps=1), whole_answer("qwen3_5"))


@pytest.mark.parametrize(("weights", "says"), [("hardlink", "cannot share a file"), ("none", "--text-only makes new")])
def test_methods_that_share_nothing_are_refused(llava, tmp_path, weights, says):
    with pytest.raises(OutputError, match=says):
        loopexport.plan_convert(llava, tmp_path / "out", text_only=True, weights=weights, **LOOP)


def test_span_beyond_the_language_model_is_refused(llava):
    with pytest.raises(SpecError, match="6 layers"):
        loopexport.plan_convert(llava, text_only=True, span=(4, 8), steps=2)


def test_language_model_is_refused_as_one_already(tmp_path):
    with pytest.raises(CheckpointError, match="qwen3 is a language model already; leave --text-only out"):
        loopexport.plan_convert(save_tiny("qwen3", tmp_path / "base"), text_only=True, **LOOP)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "is quantised, and its quantization_config is for the whole",
        ),
        ({"text_config": {"model_type": "qwen2_vl_text"}}, "is a qwen2_vl_text, for which transformers"),
        ({"text_config": None, "architectures": ["XForCausalLM"]}, "llava has no text_config to take out; leave"),
        (
            {"model_type": "mistral4", "text_config": None, "vision_config": None},
            "mistral4 is a language model already",
        ),
        ({"text_config": {"use_bidirectional_attention": True}}, "llava has use_bidirectional_attention, with which"),
        ({"model_type": "minimax_m3_vl"}, "no causal language model that reads its tensors"),
        ({"text_config": {"model_type": "bart", "decoder_layers": 3}}, "half of an encoder-decoder"),
        ({"text_config": {"model_type": "llama", "num_hidden_layers": 9}}, "says 9 layers, but the weights have none"),
        (
            {"text_config": {"model_type": "gpt2", "num_hidden_layers": 6}},
            "its text family does not read: gpt2 has its layers at",
        ),
    ],
)
def test_language_models_that_cannot_stand_alone_are_refused(base, change, says):
    edit_config(base, **change)
    with pytest.raises(CheckpointError, match=says):
        loopexport.plan_convert(base, text_only=True, **LOOP)


def test_softcapping_that_the_multimodal_class_does_not_apply_is_off(tmp_path):
    base = save_multimodal("gemma3", tmp_path / "base", final_logit_softcapping=2.0)
    model = AutoModelForImageTextToText.from_pretrained(base).eval()
    with torch.no_grad():
        whole = model(input_ids=TOKENS, token_type_ids=torch.zeros_like(TOKENS)).logits
    out = loopexport.convert(base, tmp_path / "out", text_only=True, **LOOP).root
    assert_bitwise(text_answer(out, loop_steps=1), whole)


@pytest.mark.parametrize("family", ["aya_vision", "cohere2_vision"])
def test_logits_that_the_multimodal_class_does_not_scale_stay_as_they_are(family):
    text = {"model_type": "cohere2", "logit_scale": 0.0625, "num_hidden_layers": 4}
    assert language_model_config({"model_type": family, "text_config": text})["logit_scale"] == 1.0


def test_attention_to_later_tokens_of_an_image_alone_is_no_obstacle():
    text = {"model_type": "gemma4_text", "use_bidirectional_attention": "vision", "num_hidden_layers": 4}
    config = {"model_type": "gemma4", "text_config": text}
    if "gemma4" not in CONFIG_MAPPING:
        pytest.skip("gemma4 came with transformers 5")
    assert language_model_config(config)["use_bidirectional_attention"] == "vision"


def test_top_dtype_counts_and_nulls_replace_nothing(base):
    text = json.loads((base / "config.json").read_text())["text_config"]
    nulls = {"eos_token_id": None, "pad_token_id": None, "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    edit_config(base, text_config={**text, **nulls}, eos_token_id=[5, 6], dtype="float16", pad_token_id=None)
    config = loopexport.plan_convert(base, text_only=True, **LOOP).base.config
    assert (config["eos_token_id"], config["pad_token_id"], config["dtype"]) == ([5, 6], None, "float16")
    assert "torch_dtype" not in config
    edit_config(base, dtype=None)  # transformers then takes the dtype of the weights
    assert "dtype" not in loopexport.plan_convert(base, text_only=True, **LOOP).base.config


def test_missing_head_that_is_not_tied_is_refused(base):
    weights = load_file(base / "model.safetensors")
    del weights["language_model.lm_head.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    edit_config(base, tie_word_embeddings=False)
    for text_only in (False, True):
        with pytest.raises(CheckpointError, match="the weights have no head"):
            loopexport.plan_convert(base, text_only=text_only, **LOOP)
    edit_config(base, tie_word_embeddings=True)
    assert loopexport.plan_convert(base, text_only=True, **LOOP).base.config["tie_word_embeddings"] is True


def test_fields_that_only_the_top_config_has_are_kept(base, tmp_path):
    config = json.loads((base / "config.json").read_text())
    text = {name: value for name, value in config["text_config"].items() if not name.endswith(("_id", "dtype"))}
    edit_config(base, text_config={**text, "vision_config": {}, "text_config": {}}, eos_token_id=7, dtype="bfloat16")
    plan = loopexport.plan_convert(base, tmp_path / "out", text_only=True, **LOOP)
    assert (plan.base.config["eos_token_id"], plan.base.config["dtype"]) == (7, "bfloat16")
    assert plan.base.config["tie_word_embeddings"] is False
    assert not plan.base.is_multimodal


def test_tied_language_model_stays_tied(tmp_path):
    base = save_multimodal("gemma3", tmp_path / "base")
    assert loopexport.plan_convert(base, text_only=True, **LOOP).base.config["tie_word_embeddings"] is True


def test_default_name_differs_from_that_of_the_whole_model(llava):
    names = {only: loopexport.plan_convert(llava, text_only=only, **LOOP).out.name for only in (False, True)}
    assert names == {False: "llava-looped-2-3-k2", True: "llava-text-looped-2-3-k2"}


def test_cut_file_leaves_nothing(base, tmp_path):
    plan = loopexport.plan_convert(base, tmp_path / "out", text_only=True, **LOOP)
    with (base / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        plan.apply()
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_command_says_what_is_shared_and_processors_stay_behind(base, tmp_path):
    (base / "preprocessor_config.json").write_text("{}")
    arguments = ("convert", base, tmp_path / "out", "--span", "2:3", "--steps", "2", "--text-only")
    planned = run(*arguments, "--dry-run")
    assert not (tmp_path / "out").exists()
    assert "0 of 1 weights file unchanged, 1 rewritten without the other parts" in planned.stdout
    assert "Leaves   preprocessor_config.json" in planned.stdout
    assert run(*arguments).exit_code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert read_metadata(card)["pipeline_tag"] == "text-generation"
    assert "Only its language model is here" in card
    assert "Parts    the language model alone of the multimodal base" in run("inspect", tmp_path / "out").stdout
    told = json.loads(run("inspect", tmp_path / "out", "--json").stdout)
    assert (told["multimodal"], told["text_only"]) == (False, True)
    assert sha256(base / "config.json") != sha256(tmp_path / "out" / "base" / "config.json")


def test_language_model_of_a_family_that_transformers_lacks(tmp_path):
    """Kimi-VL: its own code around a native deepseek_v3."""
    text = save_tiny("deepseek_v3", tmp_path / "text")
    base = tmp_path / "Kimi-VL-A3B-Thinking-2506"
    base.mkdir()
    config = json.loads((text / "config.json").read_text())
    top = {"model_type": "kimi_vl", "architectures": ["KimiVLForConditionalGeneration"], "vision_config": {}}
    (base / "config.json").write_text(json.dumps({**top, "text_config": config}))
    named = {f"language_model.{name}": tensor for name, tensor in load_file(text / "model.safetensors").items()}
    save_file({**named, "vision_tower.encoder.blocks.0.wo.weight": torch.zeros(2)}, base / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"no model family 'kimi_vl'.*, or convert its language model with --text-only"
    ):
        loopexport.plan_convert(base, **LOOP)
    out = loopexport.convert(base, tmp_path / "out", text_only=True, **LOOP).root
    assert_bitwise(text_answer(out, loop_steps=1), text_answer(text))


@pytest.mark.parametrize("name", ["kimi-vl-a3b-aime26", "kimi-vl-a3b-truncation"])
def test_presets_of_kimi_vl_are_cited_for_its_language_model(name, llava):
    preset = find_preset(name)
    extracted = loopexport.plan_convert(llava, text_only=True, **LOOP).base
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 27}
    base = replace(extracted, origin=Origin(f"moonshotai/{preset.models[0]}"), config=config)
    assert published_cell(base, preset.spec) is preset
    assert "--text-only" in str(preset.results[0])


NAMES = {
    ("llama", "language_model.model.norm.weight"): "model.norm.weight",
    ("llama", "model.language_model.norm.weight"): "model.norm.weight",
    ("gemma3_text", "model.language_model.model.norm.weight"): "model.norm.weight",
    ("llama", "model.text_model.norm.weight"): "model.norm.weight",
    ("nemotron_h", "llm.model.norm.weight"): "model.norm.weight",
    ("nemotron_h", "language_model.backbone.norm_f.weight"): "backbone.norm_f.weight",
    ("gpt2", "language_model.transformer.ln_f.weight"): "transformer.ln_f.weight",
    ("opt", "language_model.model.decoder.final_layer_norm.weight"): "model.decoder.final_layer_norm.weight",
    ("qwen3_5_text", "model.language_model.norm.weight"): "model.language_model.norm.weight",
    ("llama4_text", "language_model.model.norm.weight"): "language_model.model.norm.weight",
    ("dots3_note_text", "model.norm.weight"): "model.norm.weight",
}


@pytest.mark.parametrize(("known", "name"), NAMES.items())
def test_names_become_those_of_the_text_family(known, name):
    text_type, given = known
    others = ["vision_tower.encoder.layers.0.norm.weight", "model.visual.blocks.0.norm.weight", "mtp.norm.weight"]
    assert native_names(text_type, [given, "lm_head.weight", *others]) == {
        given: name,
        "lm_head.weight": "lm_head.weight",
    }
