"""A Hub cache made by hand, for tests without a network."""

from __future__ import annotations

import shutil
from pathlib import Path

from huggingface_hub import constants

COMMIT = "a" * 40


class HubCache:
    """The cache of `huggingface_hub` in an empty folder, in use until the test ends, with the client offline."""

    def __init__(self, root: Path, monkeypatch):
        self.root = root
        root.mkdir(exist_ok=True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def add(self, repo_id: str, folder: Path, commit: str = COMMIT, ref: str | None = "main") -> Path:
        """Put a copy of `folder` into the cache as one commit, and let the branch or tag `ref` name it."""
        home = self.root / f"models--{repo_id.replace('/', '--')}"
        if ref:
            (home / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
            (home / "refs" / ref).write_text(commit)
        return shutil.copytree(folder, home / "snapshots" / commit)
