"""Find a base by name: a local directory, or a Hugging Face Hub repository at one commit."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path

from loopexport.errors import CheckpointError, HubError, first_line

from . import adapter
from .cached import cached_revisions
from .checkpoint import (
    CARD,
    CARRIED,
    CONFIG,
    INDEX,
    Checkpoint,
    Origin,
    Shard,
    file_names,
    open_checkpoint,
    read_json,
    read_local_shard,
)
from .extraction import text_checkpoint
from .safetensors_header import Header, Tensor


def find_checkpoint(
    model: str,
    revision: str | None = None,
    *,
    token: str | None = None,
    headers_only: bool = False,
    without_adapter: bool = False,
    text_only: bool = False,
) -> Checkpoint:
    """Open a base; Hub files are downloaded into the Hub client's cache, unless they are there already.

    Small files come first and are checked, so that most errors show before gigabytes are downloaded. With
    `HF_HUB_OFFLINE` set, only the cache is used.

    Args:
        model: a directory or a Hub id.
        revision: a branch, tag or commit of a Hub id, resolved once to a commit; None is the main branch.
        token: the Hub token; None uses the one that is logged in.
        headers_only: read only the headers of the weights, which is enough for a plan.
        without_adapter: ignore a PEFT adapter beside the weights.
        text_only: take the language model out of a multimodal model.

    Raises:
        CheckpointError: there is no such directory, or the model cannot be looped.
        HubError: the Hub refused or could not be reached; the message says what to do.
    """
    path = Path(os.path.expanduser(model))
    if is_directory(path):
        if revision is not None:
            raise CheckpointError(f"--revision needs a Hub id, but {model} is a local directory; leave --revision out")
        names = file_names(path)
        adapter.check_adapter(model, names, lambda: read_json(path / adapter.CONFIG), without_adapter)
        found = open_checkpoint(path, names=names, text_only=text_only)
        return text_checkpoint(found) if text_only else found
    if path.exists():
        raise CheckpointError(f"{model} is a file; give the model's directory{_file_remedy(path)}")
    if not is_hub_id(model):
        raise CheckpointError(
            f"{model} is neither a directory nor a Hub id; give a model directory, or a Hub id such as org/name"
        )
    found = _download(model, revision, token, headers_only, without_adapter, text_only)
    return text_checkpoint(found) if text_only else found


def is_directory(path: Path) -> bool:
    """Whether there is a directory at a path.

    Raises:
        CheckpointError: it cannot be looked at.
    """
    try:
        return path.is_dir()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None


def _file_remedy(path: Path) -> str:
    return " (convert a GGUF file to a Hugging Face checkpoint first)" if path.suffix == ".gguf" else ""


def is_hub_id(model: str) -> bool:
    """Whether a text has the form of a Hub id, and is not a path."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return not model.startswith((".", "~", os.sep))


def _download(
    repo_id: str, revision: str | None, token: str | None, headers_only: bool, without_adapter: bool, text_only: bool
) -> Checkpoint:
    from huggingface_hub import HfApi, constants, hf_hub_download

    def check_adapter(names: set[str], revision: str | None) -> None:
        def read() -> dict:
            return read_json(Path(hf_hub_download(repo_id, adapter.CONFIG, revision=revision, token=token)))

        adapter.check_adapter(repo_id, names, read, without_adapter)

    api = HfApi(token=token)
    with _explained(repo_id, revision):
        if not constants.HF_HUB_OFFLINE:  # without a network this fails at once; a download retries for half a minute
            info = api.model_info(repo_id, revision=revision)
            check_adapter({file.rfilename for file in info.siblings or []}, info.sha)
        # The first download resolves the revision to a commit; all later ones name that commit.
        root = Path(hf_hub_download(repo_id, CONFIG, revision=revision, token=token)).parent
        origin = Origin(repo_id, revision=root.name)
        if constants.HF_HUB_OFFLINE:
            names = file_names(root)
            check_adapter(names, root.name)
            return open_checkpoint(root, origin, names, text_only=text_only)
        info = api.model_info(repo_id, revision=origin.revision, files_metadata=True)
        siblings = {file.rfilename: file for file in info.siblings or []}
        for name in siblings:
            if CARRIED.fullmatch(name) or name in (CARD, INDEX):
                hf_hub_download(repo_id, name, revision=origin.revision, token=token)

        def fetch_shard(root: Path, name: str) -> Shard:
            hf_hub_download(repo_id, name, revision=origin.revision, token=token)
            return read_local_shard(root, name)

        def fetch_header(root: Path, name: str) -> Shard:
            if name not in siblings or (root / name).exists():
                return read_local_shard(root, name)
            metadata = api.parse_safetensors_file_metadata(repo_id, name, revision=origin.revision)
            return _remote_shard(root, siblings[name], metadata)

        read_shard = fetch_header if headers_only else fetch_shard
        return open_checkpoint(root, origin, set(siblings), read_shard, text_only=text_only)


def _remote_shard(root: Path, file, metadata) -> Shard:
    """A shard that is still on the Hub, for a plan: only the digest of its header is unknown."""
    tensors = {
        name: Tensor(str(each.dtype), tuple(each.shape), each.data_offsets[1] - each.data_offsets[0])
        for name, each in metadata.tensors.items()
    }
    sha256 = file.lfs.sha256 if file.lfs else None
    return Shard(file.rfilename, root / file.rfilename, file.size, Header(tensors, sha256=""), sha256)


@contextmanager
def _explained(repo_id: str, revision: str | None):
    """Turn an error of the Hub client into a `HubError`: one line that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise HubError(
            f"{repo_id} is gated: accept its terms on its page, then log in (`hf auth login`) or set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"no directory {repo_id}, and no model of that name on the Hub that you can see; check the name, and set "
            "HF_TOKEN for a private model"
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{repo_id} has no revision {revision!r}; leave --revision out for its main branch") from None
    except errors.LocalEntryNotFoundError as error:
        raise HubError(_not_cached(repo_id, revision, first_line(error.__cause__ or error))) from None
    except errors.EntryNotFoundError:
        raise HubError(f"{repo_id} has no {CONFIG}; is it a transformers model?") from None
    except (errors.HfHubHTTPError, errors.HTTPError, OSError) as error:
        raise HubError(
            f"no directory {repo_id}, and asking the Hub for a model of that name failed ({first_line(error)}); "
            "check the path or the network, or set HF_HUB_OFFLINE=1 to use the cache"
        ) from None


def _not_cached(repo_id: str, revision: str | None, cause: str) -> str:
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        return f"cannot download {repo_id} ({cause}); check the network and run the same command again"
    revisions = cached_revisions(repo_id)
    if revisions is None:
        return (
            f"no directory {repo_id}, and no model of that name in the Hub's cache; check the path, or unset "
            "HF_HUB_OFFLINE to ask the Hub"
        )
    wanted = revision or "main"
    if wanted in revisions:
        return f"the Hub's cache has {repo_id} at {wanted} without {CONFIG}; unset HF_HUB_OFFLINE to download the rest"
    known = f"only {', '.join(revisions)}" if revisions else "no whole revision"
    return (
        f"the Hub's cache has no revision {wanted!r} of {repo_id}, {known}; give one with --revision, or unset "
        "HF_HUB_OFFLINE to ask the Hub"
    )
