"""Without the network, an absent revision is told from an absent model, and the error names what is in the cache."""

from __future__ import annotations

import pytest

import loopexport
from loopexport.errors import HubError
from support.checkpoints import write_sparse_checkpoint
from support.hub_cache import COMMIT, HubCache

OTHER, UNNAMED = "b" * 40, "c" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """`org/model` at main, at a tag and at a commit without a name; `org/partial` without its config."""
    base = write_sparse_checkpoint(tmp_path / "base", shards=1, shard_bytes=4000, layers_per_shard=6)
    cache = HubCache(tmp_path / "cache", monkeypatch)
    cache.add("org/model", base)
    cache.add("org/model", base, OTHER, ref="refs/v2")
    cache.add("org/model", base, UNNAMED, ref=None)
    (cache.add("org/partial", base) / "config.json").unlink()
    return cache


def plan(model, revision=None):
    return loopexport.plan_convert(model, span=(1, 4), steps=2, revision=revision)


@pytest.mark.parametrize("revision", [None, "main", "refs/v2", COMMIT, OTHER, UNNAMED])
def test_cached_revisions_are_found(cache, revision):
    assert plan("org/model", revision).base.origin.revision in (COMMIT, OTHER, UNNAMED)


@pytest.mark.parametrize("revision", ["v9", COMMIT[:8], "d" * 40])
def test_absent_revision_is_named_with_those_that_are_there(cache, revision):
    says = f"has no revision '{revision}' of org/model, only main, refs/v2, {UNNAMED}; give one with --revision"
    with pytest.raises(HubError, match=says):
        plan("org/model", revision)


def test_absent_model_is_no_absent_revision(cache):
    with pytest.raises(HubError, match="no model of that name in the Hub's cache"):
        plan("org/none", "v9")


def test_model_without_config_is_named_as_partial(cache):
    with pytest.raises(HubError, match=r"has org/partial at main without config\.json; unset HF_HUB_OFFLINE"):
        plan("org/partial")
