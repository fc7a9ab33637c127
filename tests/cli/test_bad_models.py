"""Bases that cannot be looped are refused in one line; odd ones are exported whole."""

from __future__ import annotations

import json
import sys

import pytest

from support.commands import SPEC, run, tree
from support.refusals import INDEX, assert_refused

BAD_CONFIGS = [
    ({"model_type": "martian"}, "has no model family 'martian'"),
    ({"model_type": None}, "has no model_type"),
    ({"model_type": 7}, "model_type 7"),
    ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "BertForMaskedLM is not a causal language model"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "ForSequenceClassification is not a causal language model"),
    ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "is an encoder-decoder"),
    ({"architectures": None}, "(architectures: no class); convert a checkpoint with a head, or set tie_word"),
    ({"architectures": ["LlamaModel"]}, "no head (lm_head), the config does not tie it"),
    ({"tie_word_embeddings": False}, "no head (lm_head), the config does not tie it"),
    ({"num_hidden_layers": 8}, "config.json says 8 layers, but the weights have none for layer 6"),
    ({"architectures": "LlamaForCausalLM"}, "is not a list of class names"),
    ({"architectures": {"LlamaForCausalLM": 1}}, "is not a list of class names"),
    ({"architectures": 7}, "architectures 7"),
    ({"architectures": ["LlamaForCausalLM", None]}, "is not a list of class names"),
    ({"num_hidden_layers": 10**12}, "is not a number of layers from 1 to 100,000"),
    ({"model_type": "mar\ntian\x1b[31m"}, "'mar\\ntian\\x1b[31m'"),
    ({"num_hidden_layers": None}, "gives no number of layers (num_hidden_layers"),
    ({"num_hidden_layers": "six"}, "'six' in "),
    ({"num_hidden_layers": -1}, "is not a number of layers"),
    ({"loop_num_passes": 3}, "has loop_num_passes, but names with loop_ are reserved for the loop"),
    ({"model_type": "looped_llama"}, "the model is looped already (looped_llama)"),
]


@pytest.mark.parametrize(("changes", "says"), BAD_CONFIGS, ids=lambda value: str(value)[:40])
def test_models_that_cannot_be_looped_are_refused(base, tmp_path, changes, says):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **changes}))
    assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, says=says)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": float("nan"), "limit": float("inf")},
        {"note": "half a character \ud800"},
        {"hidden_size": "wide", "num_attention_heads": [4, 4], "head_dim": -1},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 10**4000, "head_dim": 10**4000, "hidden_size": True},
        {"loop_span": "mine", "loop_steps": {}, "auto_map": [7], "self": 1, "__class__": 2},
        {"quantization_config": ["?"], "layer_types": "full", "dtype": {"x": 1}},
    ],
    ids=str,
)
def test_odd_configs_of_possible_models_are_exported_whole(base, tmp_path, changes):
    config = {**json.loads((base / "config.json").read_text()), **changes}
    (base / "config.json").write_text(json.dumps(config))
    assert run("convert", base, tmp_path / "out", *SPEC).exit_code == 0
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    kept = [key for key in changes if key != "auto_map" and not key.startswith("loop_")]
    assert [json.dumps(exported[key]) for key in kept] == [json.dumps(changes[key]) for key in kept]
    for command in (["inspect"], ["inspect", "--json"], ["verify", "--files-only"]):
        result = run(command[0], tmp_path / "out", *command[1:])
        assert result.exit_code == 0, result.stdout
    assert run("restore", tmp_path / "out", tmp_path / "back").exit_code == 0
    assert tree(tmp_path / "back") == tree(base)


def test_config_that_cannot_be_written_again_is_refused(base, tmp_path):
    sys.setrecursionlimit(1000)  # Python's own, which a library of an earlier test may have raised
    text = (base / "config.json").read_text()
    for depth in (985, 2000):
        (base / "config.json").write_text(f'{text[:-1]}, "deep": {"[" * depth}{"]" * depth}}}')
        for options in (["--dry-run"], []):
            assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, *options, says="config.json")


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "is not JSON"), ("[]", "is not a JSON object"), ("", "is not JSON"), ("[" * 100_000, "is not JSON")],
    ids=["cut off", "list", "empty", "deep"],
)
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_broken_json_is_refused(base, tmp_path, name, text, says):
    (base / name).write_text(text)
    assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, says=says)


def test_directory_without_config_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path, "convert", tmp_path / "empty", tmp_path / "out", *SPEC, says="no config.json in")


def test_missing_directory_is_refused(tmp_path):
    says = " is neither a directory nor a Hub id; give a model directory, or a Hub id such as org/name"
    assert_refused(tmp_path, "convert", tmp_path / "none", tmp_path / "out", *SPEC, says=f"{tmp_path / 'none'}{says}")
    assert_refused(tmp_path, "convert", "./none", tmp_path / "out", *SPEC, says=f"./none{says}")


def test_file_in_place_of_a_model_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert_refused(tmp_path, "convert", tmp_path / "model.gguf", tmp_path / "out", *SPEC, says="is a file")


@pytest.mark.parametrize(
    ("name", "remedy"), [("model.Q4.gguf", "gguf_file="), ("pytorch_model.bin", "save_pretrained"), ("a.pth", "save_")]
)
def test_weights_in_other_formats_are_refused_with_the_way_out(base, tmp_path, name, remedy):
    for path in base.glob("*.safetensors*"):
        path.unlink()
    (base / name).write_bytes(b"?")
    assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, says=remedy)


def test_no_weights_at_all_are_refused(base, tmp_path):
    for path in base.glob("*.safetensors*"):
        path.unlink()
    assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, says="no weights in")


def test_looped_base_is_refused(base, tmp_path):
    assert run("convert", base, tmp_path / "once", *SPEC).exit_code == 0
    command = ["convert", tmp_path / "once", tmp_path / "twice", *SPEC]
    assert_refused(tmp_path, *command, says=f"or run `loopexport restore {tmp_path / 'once'} OUT` and convert OUT")
    (tmp_path / "once" / "loopexport.json").unlink()  # without it, restore cannot work
    assert_refused(tmp_path, *command, says="is looped already (looped_llama); change the loop_* fields")
    assert "restore" not in run(*command).stderr


@pytest.mark.parametrize(
    "text",
    ["license: 2024-99-99", "license: !!bool maybe", "[" * 1000, 'license: "\\ud800"', "license: &a [*a]", "? {}"],
)
def test_odd_card_of_the_base_is_no_obstacle(base, tmp_path, text):
    (base / "README.md").write_text(f"---\n{text}\n---\n# Base\n")
    assert run("convert", base, tmp_path / "out", *SPEC).exit_code == 0


@pytest.mark.parametrize(
    "content", [b"\xff", b"[" * 5000, b"null", b'{"auto_map": "\\ud800", "x": "\\udfff"}'], ids=str
)
def test_odd_tokenizer_config_is_no_obstacle(base, tmp_path, content):
    (base / "tokenizer_config.json").write_bytes(content)
    assert run("convert", base, tmp_path / "out", *SPEC).exit_code == 0
    assert run("restore", tmp_path / "out", tmp_path / "back").exit_code == 0
    assert tree(tmp_path / "back") == tree(base)
