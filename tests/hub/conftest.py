"""Fixtures: a base, its repository on the Hub double, and its exports."""

from __future__ import annotations

import shutil

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from support.commands import SPEC
from support.hub_double import HubDouble
from support.hub_requests import OWNER_TOKEN
from support.push import BASE, CARD, REPO, loopexport_command
from support.tiny import VOCAB, tiny_model


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A base of three shards with tokenizer files, as in its repository."""
    root = tmp_path_factory.mktemp("push") / "base"
    tiny_model("llama").save_pretrained(root, max_shard_size="400KB")
    (root / "README.md").write_text(CARD)
    (root / "LICENSE").write_text("free\n")
    (root / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCAB)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(root / "tokenizer.json"))
    return root


@pytest.fixture
def hub(base):
    """The Hub double with the base on it; the base's commit id is the same in every test."""
    server = HubDouble()
    server.add(BASE, base)
    yield server
    server.shutdown()


@pytest.fixture(scope="session")
def converted(base, tmp_path_factory):
    """An export of the base on the Hub."""
    folder = tmp_path_factory.mktemp("converted")
    server = HubDouble()
    server.add(BASE, base)
    done = loopexport_command(server, folder / "home", "convert", BASE, folder / "out", *SPEC)
    server.shutdown()
    assert done.returncode == 0, done.stderr
    return folder / "out"


@pytest.fixture
def export(converted, tmp_path):
    """A copy of `converted` that a test may change."""
    return shutil.copytree(converted, tmp_path / "export")


@pytest.fixture
def push(hub, export, tmp_path):
    """`push(*options, to=REPO, token=...)`: push the export; status and output of the command."""

    def run(*options, to=REPO, token=OWNER_TOKEN):
        return loopexport_command(hub, tmp_path / "home", "push", export, to, *options, token=token)

    return run


@pytest.fixture
def weightless(hub, tmp_path):
    """An export of the base without weights."""
    done = loopexport_command(hub, tmp_path / "home", "convert", BASE, tmp_path / "out", *SPEC, "--weights", "none")
    assert done.returncode == 0, done.stderr
    return tmp_path / "out"
