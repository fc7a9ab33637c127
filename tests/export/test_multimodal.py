"""Multimodal exports: the whole checkpoint and its processor, with the loop on top of the config."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, AutoProcessor

import loopexport
from loopexport.base import processor
from loopexport.errors import CheckpointError
from loopexport.export.adoption import plan_adopt
from loopexport.export.directory import open_export
from loopexport.export.own_code import foreign_code
from loopexport.export.small_files import export_card, export_warnings, without_foreign_code
from support.commands import run, sha256, tree
from support.multimodal import KINDS, image_prompt, save_multimodal
from support.small_tokenizer import write_tokenizer

LOOP = {"span": (2, 3), "steps": 2}
PREPROCESSOR = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 28}, "do_center_crop": False}
PROCESSOR = {"processor_class": "LlavaProcessor", "patch_size": 7, "num_additional_image_tokens": 1}
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def write_processor(root, **preprocessor):
    """A processor of LLaVA as its checkpoints have it: three files, a tokenizer and a template."""
    write_tokenizer(root, "PreTrainedTokenizerFast")
    (root / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, **preprocessor}))
    (root / "processor_config.json").write_text(json.dumps(PROCESSOR))
    (root / "video_preprocessor_config.json").write_text("{}")
    (root / "chat_template.jinja").write_text(CHAT)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_multimodal("llava", tmp_path_factory.mktemp("multimodal") / "base")


@pytest.fixture
def base(saved, tmp_path):
    """A copy that a test may change, with a processor."""
    root = shutil.copytree(saved, tmp_path / "base")
    write_processor(root)
    return root


def answer(root, inputs, **options):
    model = AutoModelForImageTextToText.from_pretrained(root, trust_remote_code=True, **options).eval()
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("kind", KINDS)
def test_export_is_the_whole_checkpoint_with_the_loop_on_top(kind, tmp_path):
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    base = save_multimodal(kind, tmp_path / "base")
    out = loopexport.convert(base, tmp_path / "out", **LOOP).root
    config, native = (json.loads((root / "config.json").read_text()) for root in (out, base))
    assert config["model_type"] == f"looped_{kind}"
    [name] = config["architectures"]
    assert name.startswith("Looped")
    assert name.endswith("ForConditionalGeneration")
    assert set(config["auto_map"].values()) >= {f"modeling_looped.{name}"}
    assert config["text_config"] == native["text_config"]
    assert config["loop_span"] == [2, 3]
    assert sha256(out / "model.safetensors") == sha256(base / "model.safetensors")
    loading = AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True, output_loading_info=True)[1]
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    inputs = image_prompt(kind)
    natural = answer(base, inputs)
    assert torch.equal(answer(out, inputs, loop_steps=1), natural)
    assert not torch.equal(answer(out, inputs), natural)
    restored = loopexport.restore(out, tmp_path / "restored").root
    assert tree(restored) == tree(base)


def test_processor_loads_from_the_export_as_from_the_base(base, tmp_path):
    plan = loopexport.plan_convert(base, tmp_path / "out", **LOOP)
    assert not [warning for warning in plan.warnings if "rocessor" in warning]
    out = plan.apply().root
    for name in (*processor.NAMES[:3], "chat_template.jinja"):
        assert sha256(out / name) == sha256(base / name)
    pytest.importorskip("PIL", reason="image processors of transformers need pillow")
    theirs = AutoProcessor.from_pretrained(base)
    ours = AutoProcessor.from_pretrained(out, trust_remote_code=True)
    assert type(ours) is type(theirs)
    assert ours.to_dict() == theirs.to_dict()
    assert ours.chat_template == CHAT


def test_missing_processor_is_told_and_the_card_says_so(saved, tmp_path):
    plan = loopexport.plan_convert(saved, tmp_path / "out", **LOOP)
    told = "base has no preprocessor_config.json; AutoProcessor will not load"
    assert any(told in warning for warning in plan.warnings)
    export = plan.apply()
    assert any(told in warning for warning in export_warnings(export))
    assert "had no processor" in export_card(export)


def test_processor_loses_the_code_of_its_base_and_restore_brings_it_back(base, tmp_path):
    entries = {"AutoProcessor": "org/base--processing_own.OwnProcessor", "AutoImageProcessor": "image_own.OwnImages"}
    write_processor(base, auto_map=entries)
    (base / "processing_own.py").write_text("raise RuntimeError\n")
    plan = loopexport.plan_convert(base, tmp_path / "out", **LOOP)
    told = next(warning for warning in plan.warnings if "code of the base" in warning)
    assert "image_own.OwnImages, processing_own.OwnProcessor" in told
    out = plan.apply().root
    assert json.loads((out / "preprocessor_config.json").read_text()) == PREPROCESSOR
    assert foreign_code(open_export(out)) is None
    assert told in export_warnings(open_export(out))
    restored = loopexport.restore(out, tmp_path / "restored").root
    assert sha256(restored / "preprocessor_config.json") == sha256(base / "preprocessor_config.json")
    (out / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, "auto_map": entries}))
    assert foreign_code(open_export(out)) == "the auto_map of preprocessor_config.json"


def test_processor_class_in_the_tokenizers_config_is_foreign_code_too():
    files = {"tokenizer_config.json": json.dumps({"auto_map": {"AutoProcessor": "own.Own"}, "pad_token": "x"}).encode()}
    kept = dict(files)
    assert processor.without_foreign_code(files) == kept
    assert json.loads(files["tokenizer_config.json"]) == {"pad_token": "x"}


def test_parts_of_a_processor_lose_the_code_of_the_base_too():
    """transformers 5 writes the image processor into processor_config.json, with an `auto_map` of its own."""
    parts = {"image_processor": {"size": 3, "auto_map": {"AutoImageProcessor": ["a.Slow", "org/b--a.Fast"]}}}
    content = json.dumps({"auto_map": {"AutoProcessor": "a.Own"}, **parts, "more": [{"auto_map": {}}]}).encode()
    files = {"processor_config.json": content}
    assert processor.foreign_classes(files) == ["a.Fast", "a.Own", "a.Slow"]
    assert processor.without_foreign_code(files) == {"processor_config.json": content}
    assert json.loads(files["processor_config.json"]) == {"image_processor": {"size": 3}, "more": [{}]}


def test_original_of_a_config_with_code_at_two_levels_is_whole():
    config = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "part": {"auto_map": {"AutoProcessor": "own.More"}}}
    content = json.dumps(config).encode()
    files = {"tokenizer_config.json": content, "tokenizer.json": b"{}"}
    assert without_foreign_code(files) == {"tokenizer_config.json": content}
    assert b"auto_map" not in files["tokenizer_config.json"]


@pytest.mark.parametrize("content", ["{", "[1]"])
@pytest.mark.parametrize("name", ["processor_config.json", "preprocessor_config.json"])
def test_broken_processor_file_is_refused(base, tmp_path, name, content):
    (base / name).write_text(content)
    with pytest.raises(CheckpointError, match=f"{name} is not a JSON object; download"):
        loopexport.plan_convert(base, tmp_path / "out", **LOOP)


def test_trained_multimodal_model_is_adopted_with_the_processor_of_its_base(base, tmp_path):
    out = loopexport.convert(base, tmp_path / "out", **LOOP).root
    model = AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True)
    torch.nn.init.normal_(model.lm_head.weight)
    model.save_pretrained(tmp_path / "tuned")
    assert any("no tokenizer and no processor" in line for line in plan_adopt(tmp_path / "tuned").warnings)
    assert not any("no processor" in line for line in plan_adopt(tmp_path / "tuned", base=base).warnings)
    write_processor(tmp_path / "tuned", auto_map={"AutoImageProcessor": "own.Images"})
    assert any("not copied (own.Images)" in line for line in plan_adopt(tmp_path / "tuned").warnings)
    for name in (*processor.NAMES, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "tuned" / name).unlink(missing_ok=True)
    adopted = loopexport.adopt(tmp_path / "tuned", base=base)
    assert adopted.base.config["architectures"] == ["LlavaForConditionalGeneration"]
    assert sha256(adopted.root / "preprocessor_config.json") == sha256(base / "preprocessor_config.json")
    inputs = image_prompt("llava")
    with torch.no_grad():
        assert torch.equal(answer(adopted.root, inputs), model.eval()(**inputs).logits)
    native = loopexport.restore(adopted.root, tmp_path / "native").root
    assert torch.equal(answer(native, inputs), answer(adopted.root, inputs, loop_steps=1))


def test_inspect_tells_the_layers_of_the_language_model(base, tmp_path):
    out = loopexport.convert(base, tmp_path / "out", **LOOP).root
    shown = json.loads(run("inspect", out, "--json").stdout)
    assert shown["cost"]["base_layer_evaluations"] == 6
    assert (shown["multimodal"], shown["text_only"]) == (True, False)
    text = run("inspect", out).stdout
    assert "6 layers" in text
    assert "Parts    multimodal: the loop is in the language model" in text
