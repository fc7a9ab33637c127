"""Checkpoints that transformers would fill up with random weights are refused; those that it loads right are not."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import loopexport
from loopexport.base import families
from loopexport.base.loadable import RENAMED_LAYERS, check_loadable
from loopexport.errors import CheckpointError
from support.family_walk import RELEASE, save_tiny_family, tiny_family_config
from support.tiny import FAMILIES, save_tiny, tiny_config, tiny_tokens

PLAN = {"span": (1, 4), "steps": 2, "dry_run": True}


@pytest.fixture
def base(tmp_path):
    return save_tiny("llama", tmp_path / "base")


def edit_config(root, **changes):
    path = root / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rename(root, change):
    """Rename each tensor by `change`; drop those for which it returns None."""
    path = root / "model.safetensors"
    tensors = {change(name): tensor for name, tensor in load_file(path).items()}
    tensors.pop(None, None)
    save_file(tensors, path, metadata={"format": "pt"})


def missing_in_transformers(root):
    return AutoModelForCausalLM.from_pretrained(root, output_loading_info=True)[1]["missing_keys"]


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_checkpoints_of_every_tiny_family_pass(family, tmp_path):
    assert loopexport.plan_convert(save_tiny(family, tmp_path / "base"), **PLAN).base.num_layers == 6


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda name: f"base_model.model.{name}", r"because of 'base_model\.'; save the merged model again"),
        (lambda name: name.replace("q_proj.", "q_proj.base_layer."), "save the merged model again"),
        (lambda name: f"module.{name}", r"because of 'module\.'; save the model inside"),
        (lambda name: f"_orig_mod.{name}", "_orig_mod.save_pretrained"),
        (lambda name: name.replace("layers.0.", "layers.0._orig_mod."), "_orig_mod.save_pretrained"),
        (lambda name: name.replace("layers.5.", "layers.5._fsdp_wrapped_module."), "without the wrappers"),
        (lambda name: f"language_model.{name}", "convert the multimodal checkpoint itself"),
        (lambda name: name.replace("model.", "model.language_model."), "convert the multimodal checkpoint itself"),
        (lambda name: None if ".layers.4." in name else name, "says 6 layers, but the weights have none for layer 4"),
        (lambda name: None if name == "lm_head.weight" else name, r"have no head \(lm_head\)"),
        (lambda name: None if "embed" in name else name, "no token embeddings"),
        (lambda name: None if name == "model.norm.weight" else name, "no final norm"),
        (lambda name: None if ".layers." in name else name, "the weights have no layers"),
        (lambda name: name.replace("model.layers.", "transformer.h."), r"transformer\.h\..*llama has its layers at"),
        (lambda name: name.replace("model.layers.", "gpt_neox.layers."), "rename the tensors"),
    ],
)
def test_names_that_leave_weights_random_are_refused(base, change, says):
    rename(base, change)
    with pytest.raises(CheckpointError, match=says):
        loopexport.plan_convert(base, **PLAN)
    assert missing_in_transformers(base)


def test_no_family_that_can_be_looped_is_refused_by_its_own_names():
    """Each with the names of the installed transformers, and with those of its bare model."""
    seen = 0
    for family, outcomes in families.outcomes().items():
        if outcomes.get(RELEASE, "").partition(":")[0] not in ("works", "in part") or families.READS in outcomes:
            continue
        config = tiny_family_config(family)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        check_loadable(config.to_dict(), list(model.state_dict()))
        bare = [name.removeprefix(f"{model.base_model_prefix}.") for name in model.state_dict()]
        check_loadable(config.to_dict(), bare)
        seen += 1
    assert seen > 50


@pytest.mark.parametrize(("family", "names"), RENAMED_LAYERS.items())
def test_names_that_transformers_renames_pass(family, names):
    conversion = pytest.importorskip("transformers.conversion_mapping", reason="transformers 4 renames nothing")
    if family not in CONFIG_MAPPING or conversion.get_checkpoint_conversion_mapping(family) is None:
        pytest.skip(f"this transformers does not rename tensors of {family}")
    config = tiny_family_config(family)
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(config).state_dict()
    check_loadable(config.to_dict(), [name.replace("model.layers", names) for name in tensors])


def test_text_family_that_reads_names_of_its_multimodal_model_passes(tmp_path):
    if "qwen3_5_text" not in CONFIG_MAPPING:
        pytest.skip("qwen3_5_text came with transformers 5")
    base = save_tiny_family("qwen3_5_text", tmp_path / "base")
    rename(base, lambda name: name.replace("model.", "model.language_model."))
    assert not missing_in_transformers(base)
    assert loopexport.plan_convert(base, span=(3, 4), steps=2, dry_run=True)


def test_more_layers_in_the_config_than_in_the_weights_are_refused(base):
    edit_config(base, num_hidden_layers=8)
    with pytest.raises(CheckpointError, match=r"says 8 layers, but the weights have none for layer 6"):
        loopexport.plan_convert(base, **PLAN)
    assert missing_in_transformers(base)


@pytest.mark.parametrize("architectures", [None, [], ["LlamaModel"]], ids=str)
def test_config_that_names_no_head_passes_if_the_weights_have_one(base, tmp_path, architectures):
    edit_config(base, architectures=architectures)
    out = loopexport.convert(base, tmp_path / "out", span=(1, 4), steps=2).root
    assert_same_at_one_step(out, base)


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_bare_model_passes_if_its_head_is_tied(family, tmp_path):
    torch.manual_seed(0)
    AutoModel.from_config(tiny_config(family)).save_pretrained(tmp_path / "base")
    out = loopexport.convert(tmp_path / "base", tmp_path / "out", span=(1, 4), steps=2).root
    assert_same_at_one_step(out, tmp_path / "base")
    edit_config(tmp_path / "base", tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"does not tie it .* \(architectures: \w+Model\)"):
        loopexport.plan_convert(tmp_path / "base", **PLAN)


def test_family_decides_where_the_config_of_a_bare_model_is_silent(tmp_path):
    for family, ties in (("gpt2", True), ("llama", False)):
        root = tmp_path / family
        AutoModel.from_config(tiny_config(family)).save_pretrained(root)
        config = json.loads((root / "config.json").read_text())
        config.pop("tie_word_embeddings", None)
        (root / "config.json").write_text(json.dumps(config))
        if ties:
            assert loopexport.plan_convert(root, **PLAN)
        else:
            with pytest.raises(CheckpointError, match="have no head"):
                loopexport.plan_convert(root, **PLAN)


def test_classifier_is_refused_by_its_name(tmp_path):
    model = AutoModelForSequenceClassification.from_config(tiny_config("llama"))
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"ForSequenceClassification is not .* with the head of one"):
        loopexport.plan_convert(tmp_path / "base", **PLAN)


def assert_same_at_one_step(out, base):
    looped = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, loop_steps=1).eval()
    native = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        assert torch.equal(looped(tiny_tokens(1, 6)).logits, native(tiny_tokens(1, 6)).logits)


def test_bare_model_of_a_family_that_is_gone_from_transformers_is_refused(base, monkeypatch):
    monkeypatch.setattr(families, "outcomes", lambda: {"martian": {"4.57": "works"}})
    edit_config(base, model_type="martian", architectures=None, tie_word_embeddings=None)
    rename(base, lambda name: None if name == "lm_head.weight" else name)
    with pytest.raises(CheckpointError, match="has no model family 'martian'"):
        loopexport.plan_convert(base, **PLAN)
