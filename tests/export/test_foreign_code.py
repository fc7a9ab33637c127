"""Bases that ship code of their own: none of it is carried, and what cannot do without it fails aloud."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import loopexport
from loopexport.export.small_files import export_card
from support.commands import run, sha256, tree
from support.damage import EXPLODES
from support.small_tokenizer import write_tokenizer
from support.tiny import save_tiny

FOREIGN_TOKENIZER = (
    "from transformers import PreTrainedTokenizerFast\n\n\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
)


@pytest.fixture
def base(tmp_path):
    """A deepseek_v3 base as Moonlight's is: native, but with modeling code beside it."""
    root = save_tiny("deepseek_v3", tmp_path / "base")
    config = json.loads((root / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    }
    (root / "config.json").write_text(json.dumps(config))
    for name in ("configuration_deepseek.py", "modeling_deepseek.py"):
        (root / name).write_text(EXPLODES)
    return root


def add_tokenizer(root, reference, code):
    write_tokenizer(root, None)
    config = json.loads((root / "tokenizer_config.json").read_text())
    config["auto_map"] = reference
    (root / "tokenizer_config.json").write_text(json.dumps(config))
    (root / "tokenization_own.py").write_text(code)


def test_base_with_its_own_modeling_code_runs_by_the_native_family(base, tmp_path):
    out = loopexport.convert(str(base), tmp_path / "out", span=(1, 4), steps=2).root
    assert not {"configuration_deepseek.py", "modeling_deepseek.py"} & set(tree(out))
    config = json.loads((out / "config.json").read_text())
    assert all("deepseek." not in entry for entry in config["auto_map"].values())
    assert all(check.passed for check in loopexport.verify(out))
    tokens = torch.tensor([[5, 6, 7]])
    looped = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, loop_steps=1)
    native = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False)
    with torch.no_grad():
        assert torch.equal(looped(tokens).logits, native(tokens).logits)


@pytest.mark.parametrize(
    "reference",
    [
        {"AutoTokenizer": ["other/repo--tokenization_own.Slow", "tokenization_own.OwnTokenizer"]},
        ["tokenization_own.OwnTokenizer", None],
    ],
    ids=["dict", "list"],
)
def test_tokenizer_that_is_all_in_its_json_gives_the_bases_ids(tmp_path, reference):
    base = save_tiny("llama", tmp_path / "base")  # whose config names no code: transformers 4 would run that as well
    add_tokenizer(base, reference, FOREIGN_TOKENIZER)
    result = run("convert", base, tmp_path / "out", "--span", "1:4", "--steps", "2")
    assert "tokenizer class tokenization_own.OwnTokenizer is not copied" in result.stdout
    assert "tokenization_own.py" not in tree(tmp_path / "out")
    text = "it is 12345, isn't it"
    theirs = AutoTokenizer.from_pretrained(base, trust_remote_code=True)
    ours = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(theirs).__name__ == "OwnTokenizer"
    assert ours(text).input_ids == theirs(text).input_ids
    assert ours.pad_token == theirs.pad_token == "<pad>"
    assert export_card(loopexport.open_export(tmp_path / "out")) == (tmp_path / "out" / "README.md").read_text()


def test_tokenizer_that_is_code_alone_is_left_out_and_fails_aloud(base, tmp_path):
    add_tokenizer(base, {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}, EXPLODES)
    (base / "tokenizer.json").unlink()
    (base / "tiktoken.model").write_text("aXQ= 0\n")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    out = tmp_path / "out"
    result = run("convert", base, out, "--span", "1:4", "--steps", "2")
    assert "the tokenizer needs code of the base (tokenization_own.OwnTokenizer) and is not copied" in result.stdout
    names = set(tree(out))
    assert {"base/tiktoken.model", "base/tokenizer_config.json", "chat_template.jinja"} <= names
    assert not {"tiktoken.model", "tokenization_own.py"} & names
    card = (out / "README.md").read_text()
    assert 'AutoTokenizer.from_pretrained("base", trust_remote_code=True)' in card
    assert export_card(loopexport.open_export(out)) == card, "made anew, it still leads to the base's tokenizer"
    assert "and is not copied: load it from base" in run("inspect", out).stdout
    with pytest.raises((ValueError, ImportError, OSError)):
        AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert all(check.passed for check in loopexport.verify(out, files_only=True))
    loopexport.restore(out, tmp_path / "restored")
    for name in ("tiktoken.model", "tokenizer_config.json", "config.json", "chat_template.jinja"):
        assert sha256(tmp_path / "restored" / name) == sha256(base / name)


def test_tokenizer_without_foreign_code_is_carried_as_it_is(base, tmp_path):
    write_tokenizer(base, "PreTrainedTokenizerFast")
    out = loopexport.convert(str(base), tmp_path / "out", span=(1, 4), steps=2).root
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert sha256(out / name) == sha256(base / name)
