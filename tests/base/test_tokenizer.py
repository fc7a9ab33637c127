"""Every file that a tokenizer reads is carried, and an export without a tokenizer says so."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil

import pytest
from transformers import AutoTokenizer, GPTNeoXJapaneseTokenizer, PreTrainedTokenizerBase, models

import loopexport
from loopexport.base.checkpoint import CARRIED
from loopexport.export.small_files import export_card, export_warnings
from support.checkpoints import write_sparse_checkpoint
from support.commands import SPEC, run
from support.hub_cache import HubCache
from support.small_tokenizer import write_tokenizer

PICKLES = {"vocab.pkl", "vocab.bin"}  # of transfo-xl, which transformers 5 no longer has


@pytest.fixture
def base(tmp_path):
    return write_sparse_checkpoint(tmp_path / "base", shards=1, shard_bytes=4000, layers_per_shard=6)


def tokenizer_classes():
    for module in pkgutil.walk_packages(models.__path__, f"{models.__name__}."):
        if "tokenization" not in module.name.rsplit(".", 1)[-1]:
            continue
        try:
            found = vars(importlib.import_module(module.name)).values()
        except (ImportError, NameError):  # it needs a library that is not here
            continue
        yield from (each for each in found if inspect.isclass(each) and issubclass(each, PreTrainedTokenizerBase))


def test_files_of_every_tokenizer_class_are_carried():
    names = {name for each in tokenizer_classes() for name in (each.vocab_files_names or {}).values()}
    assert len(names) > 20
    assert {name for name in names if not CARRIED.fullmatch(name)} <= PICKLES


@pytest.mark.parametrize(
    "name", [*sorted(PICKLES), "emoji.py", "emoji.json.py", "x/emoji.json", "emojixjson", "bpe.codes.pkl"]
)
def test_names_that_only_resemble_those_are_not(name):
    assert not CARRIED.fullmatch(name)


def test_tokenizer_that_reads_a_second_file_loads_from_the_export(base, tmp_path):
    words = ["<|startoftext|>", "<|endoftext|>", "こ", "ん", "<SP>", *(f"<|byte{number}|>" for number in range(256))]
    (tmp_path / "words.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    (tmp_path / "emoji").write_text(json.dumps({"emoji": {}, "emoji_inv": {"/a/b": "x"}}))
    GPTNeoXJapaneseTokenizer(str(tmp_path / "words.txt"), str(tmp_path / "emoji")).save_pretrained(base)
    out = loopexport.convert(base, tmp_path / "out", span=(1, 4), steps=2).root
    text = "こん ん"
    assert AutoTokenizer.from_pretrained(out)(text).input_ids == AutoTokenizer.from_pretrained(base)(text).input_ids


def test_base_without_tokenizer_gives_a_warning_and_a_card_without_one(base, tmp_path):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):  # settings alone are no tokenizer
        (base / name).write_text("{}")
    assert (
        "directory has no tokenizer, so the export has none: add its"
        in run("convert", base, tmp_path / "out", *SPEC).stdout
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoTokenizer" not in card
    assert "# The base's directory had no tokenizer: this model takes token ids." in card
    export = loopexport.open_export(tmp_path / "out")
    assert export_card(export) == card
    assert any("has no tokenizer" in each for each in export_warnings(export))


@pytest.mark.parametrize("config", [{"tokenizer_class": "ByT5Tokenizer"}, None], ids=str)
def test_base_with_a_tokenizer_gives_no_warning(base, tmp_path, config):
    if config is None:
        write_tokenizer(base, None)
    else:
        (base / "tokenizer_config.json").write_text(json.dumps(config))
    plan = loopexport.plan_convert(base, tmp_path / "out", span=(1, 4), steps=2)
    assert not [each for each in plan.warnings if "tokenizer" in each]
    assert b"AutoTokenizer.from_pretrained(path" in plan.files["README.md"]


def test_card_of_a_hub_base_without_tokenizer_files_leads_to_its_id(base, tmp_path, monkeypatch):
    """The cache of someone who only ever loaded the weights."""
    HubCache(tmp_path / "cache", monkeypatch).add("org/model", base)
    plan = loopexport.plan_convert("org/model", tmp_path / "out", span=(1, 4), steps=2)
    assert [each for each in plan.warnings if "load it from org/model, or, if only the Hub's cache" in each]
    assert b'AutoTokenizer.from_pretrained("org/model", trust_remote_code=True)' in plan.files["README.md"]
