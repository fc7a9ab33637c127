"""A PEFT adapter beside the weights: refused with the way out, or ignored where the user says so."""

from __future__ import annotations

import json

import pytest

import loopexport
from loopexport.errors import CheckpointError
from support.checkpoints import write_sparse_checkpoint
from support.commands import SPEC, run, tree
from support.refusals import assert_refused


@pytest.fixture
def base(tmp_path):
    """A base of six layers with an adapter beside its weights."""
    root = write_sparse_checkpoint(tmp_path / "base", shards=1, shard_bytes=4000, layers_per_shard=6)
    add_adapter(root)
    return root


def add_adapter(root, **config):
    (root / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/model", **config}))
    (root / "adapter_model.safetensors").write_bytes(b"?")


def test_adapter_beside_the_weights_is_refused_with_the_way_out(base, tmp_path):
    says = "holds an adapter for org/model (adapter_config.json), which transformers loads with peft"
    assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, says=says)
    assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, says="--without-adapter")


def test_ignored_adapter_is_left_behind(base, tmp_path):
    done = run("convert", base, tmp_path / "out", *SPEC, "--without-adapter")
    assert "Leaves   adapter_config.json, adapter_model.safetensors" in done.stdout
    assert not [name for name in tree(tmp_path / "out") if "adapter" in name]
    assert loopexport.plan_convert(base, span=(1, 4), steps=2, without_adapter=True)


@pytest.mark.parametrize("ignored", [[], ["--without-adapter"]], ids=str)
@pytest.mark.parametrize(
    "others", [[], ["config.json", "optimizer.pt", "training_args.bin", "tokenizer.json"]], ids=str
)
def test_adapter_alone_is_named_as_such(tmp_path, ignored, others):
    (tmp_path / "adapter").mkdir()
    add_adapter(tmp_path / "adapter")
    for name in others:
        (tmp_path / "adapter" / name).write_text("{}")
    says = "adapter holds only an adapter for org/model; load it with peft, then `merge_and_unload()`"
    assert_refused(tmp_path, "convert", tmp_path / "adapter", tmp_path / "out", *SPEC, *ignored, says=says)


def test_adapter_config_may_hold_anything(base):
    for name in (None, 7, ["x"]):
        add_adapter(base, base_model_name_or_path=name)
        with pytest.raises(CheckpointError, match="holds an adapter "):
            loopexport.plan_convert(base, span=(1, 4), steps=2)
    (base / "adapter_config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is not JSON"):
        loopexport.plan_convert(base, span=(1, 4), steps=2)
