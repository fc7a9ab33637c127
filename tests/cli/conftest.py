"""Fixture: a small base of zeros, for commands that need no model."""

from __future__ import annotations

import pytest

from support.checkpoints import write_sparse_checkpoint


@pytest.fixture
def base(tmp_path):
    """A checkpoint of two shards."""
    return write_sparse_checkpoint(tmp_path / "base", shards=2, shard_bytes=40_000, layers_per_shard=3)
