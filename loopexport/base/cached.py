"""Which revisions of a model the Hub's cache has. The client itself only says that a file is not there."""

from __future__ import annotations

from pathlib import Path


def cached_revisions(repo_id: str) -> list[str] | None:
    """The branches, tags and other commits of a model in the Hub's cache; None if the cache does not have the model."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    home = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model")
    try:
        commits = {path.name for path in (home / "snapshots").iterdir()}
        refs = {
            path.relative_to(home / "refs").as_posix(): path.read_text().strip()
            for path in sorted((home / "refs").rglob("*"))
            if path.is_file()
        }
    except (OSError, ValueError):
        return None
    named = [name for name, commit in refs.items() if commit in commits]
    return [*named, *sorted(commits - set(refs.values()))]
