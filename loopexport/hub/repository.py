"""The Hub repository that `push` writes to: read its state, then change it in a single commit."""

from __future__ import annotations

import inspect
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopexport.base.checkpoint import CARD, Origin
from loopexport.errors import ExportError, HubError, PushError, first_line, one_line
from loopexport.export.manifest import MANIFEST, Manifest, read_manifest

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAIN = "main"
AGAIN = "run the same command again: finished files are not uploaded twice"


class CopyRefusedError(Exception):
    """The Hub refuses to copy files from the base's repository; upload them instead."""


@dataclass(frozen=True)
class RemoteFile:
    """A file in a Hub repository.

    Attributes:
        size: in bytes.
        git_id: the git blob id; for a regular file it identifies the content.
        sha256: of the content, for a large file; None for a regular file.
        is_copyable: whether the Hub can copy it into another repository.
    """

    size: int
    git_id: str
    sha256: str | None
    is_copyable: bool


@dataclass(frozen=True)
class Target:
    """The repository and branch to write to, in the state in which `read_target` found them.

    Attributes:
        repo_id: the repository, such as `me/name`.
        revision: the branch.
        exists: whether the repository exists.
        has_branch: whether the branch exists.
        is_private: whether the repository is private; None if it does not exist.
        head: the newest commit of the branch, or of `main` if the branch does not exist; None for a new repository.
        files: the files of that commit, by name.
        card: its model card; None if it has none.
        manifest: the manifest of the export that it holds; None if it holds none.
    """

    repo_id: str
    revision: str
    exists: bool = False
    has_branch: bool = False
    is_private: bool | None = None
    head: str | None = None
    files: dict[str, RemoteFile] = field(default_factory=dict)
    card: str | None = None
    manifest: Manifest | None = None


def connect(token: str | None) -> tuple[HfApi, str]:
    """Log in to the Hub: its client, and the name of the token's owner.

    Raises:
        HubError: there is no token, or the Hub does not accept it; the message says how to set one.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="loopexport")
    with explain_hub_errors("your account"):
        return api, api.whoami()["name"]


def read_target(api: HfApi, repo_id: str, revision: str, *, needs_write: bool) -> Target:
    """Read the state of a repository and branch, which need not exist.

    Args:
        api: the Hub client.
        repo_id: the repository.
        revision: the branch.
        needs_write: whether to check that the user may write to the repository.

    Raises:
        HubError: the Hub refused, or cannot be reached; the message says what to do.
    """
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    with explain_hub_errors(repo_id):
        try:
            info = api.model_info(repo_id)
        except RepositoryNotFoundError as error:
            if error.response is not None and error.response.status_code == 401:
                raise
            return Target(repo_id, revision)
        if needs_write and "write" in inspect.signature(api.auth_check).parameters:
            api.auth_check(repo_id, write=True)
        has_branch = True
        if revision != MAIN:
            try:
                info = api.model_info(repo_id, revision=revision)
            except RevisionNotFoundError:
                has_branch = False
        head = info.sha or MAIN
        files = list_files(api, repo_id, head)
        card, manifest = _read_export(api, repo_id, head, files)
    return Target(repo_id, revision, True, has_branch, info.private, head, files, card, manifest)


def list_files(api: HfApi, repo_id: str, revision: str, names: list[str] | None = None) -> dict[str, RemoteFile]:
    """The files of a commit by name: those in `names`, or all.

    Raises:
        HubError: the Hub refused, or cannot be reached.
    """
    with explain_hub_errors(repo_id):
        if names is None:
            entries = list(api.list_repo_tree(repo_id, recursive=True, revision=revision))
        else:
            entries = api.get_paths_info(repo_id, names, revision=revision)
    return {entry.path: _remote_file(entry) for entry in entries if hasattr(entry, "blob_id")}


def cannot_copy_from(base: Origin, repo_id: str) -> str:
    """Why the Hub cannot copy files of this base into the repository; empty if it can."""
    from huggingface_hub import CommitOperationCopy

    if base.revision is None:
        return f"the base {base.name} is a local directory"
    if base.name != repo_id and "src_repo_id" not in inspect.signature(CommitOperationCopy).parameters:
        return "this huggingface_hub cannot copy between repositories; install version 2"
    return ""


def create_missing(api: HfApi, target: Target, *, private: bool) -> None:
    """Create the repository and the branch if they do not exist.

    Raises:
        HubError: the Hub refused, or cannot be reached.
    """
    with explain_hub_errors(target.repo_id):
        if not target.exists:
            api.create_repo(target.repo_id, private=private or None, exist_ok=True)
        if not target.has_branch and target.revision != MAIN:
            api.create_branch(target.repo_id, branch=target.revision, exist_ok=True)


def commit(
    api: HfApi,
    target: Target,
    message: str,
    *,
    additions: dict[str, tuple[bytes | Path, str]],
    copies: list[str],
    base: Origin,
    deletions: list[str],
    create_pr: bool,
) -> tuple[str, str | None]:
    """Upload files, then change the repository in one commit; returns its id and the URL of the pull request, if any.

    Args:
        api: the Hub client.
        target: the repository and branch; the commit fails if the branch has moved since `read_target`.
        message: the commit message.
        additions: for each file to upload, its content (bytes, or the path of a file) and its sha256.
        copies: names of the files that the Hub copies from `base`.
        base: a Hub repository at a commit.
        deletions: names of the files to delete.
        create_pr: open a pull request instead of changing the branch.

    Raises:
        CopyRefusedError: the Hub refuses to copy these files; nothing has changed.
        HubError: the Hub refused, or cannot be reached; nothing has changed, unless only the Hub's answer was lost.
        PushError: the repository's .gitignore would drop a file; nothing has changed.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

    source: dict[str, Any] = {} if base.name == target.repo_id else {"src_repo_id": base.name, "src_repo_type": "model"}
    adding = [CommitOperationAdd(name, content) for name, (content, _) in additions.items()]
    for operation in adding:  # known digests save the client a second pass over large files
        operation.upload_info.sha256 = bytes.fromhex(additions[operation.path_in_repo][1])
    operations: list[Any] = [
        *adding,
        *(CommitOperationCopy(name, name, src_revision=base.revision, **source) for name in copies),
        *(CommitOperationDelete(name) for name in deletions),
    ]
    where: dict[str, Any] = {"revision": target.revision, "create_pr": create_pr}
    with explain_hub_errors(target.repo_id), _copy_refusals():
        # Not left to create_commit, because only this call can stop the repository's .gitignore from dropping files.
        api.preupload_lfs_files(target.repo_id, adding, gitignore_content="", **where)
        _check_none_dropped(adding, target)
        done = api.create_commit(target.repo_id, operations, commit_message=message, parent_commit=target.head, **where)
    return done.oid, done.pr_url


def _check_none_dropped(adding: list, target: Target) -> None:
    """Raise PushError if the client is about to leave a file out of the commit; only a private attribute says so."""
    dropped = [operation.path_in_repo for operation in adding if getattr(operation, "_should_ignore", False)]
    if dropped:
        raise PushError(f"the .gitignore of {target.repo_id} excludes {dropped[0]}; remove that line from it first")


@contextmanager
def explain_hub_errors(what: str):
    """Turn an error of the Hub client into a `HubError`: one line that says what to do.

    Args:
        what: the repository, for the message.
    """
    from huggingface_hub import errors

    try:
        yield
    except (errors.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise HubError(_explain(error, what)) from None


@contextmanager
def _copy_refusals():
    from huggingface_hub import errors

    try:
        yield
    except getattr(errors, "FileDuplicationError", ()) as error:
        raise CopyRefusedError(one_line(error)) from None
    except errors.EntryNotFoundError as error:
        if "Cannot copy" not in str(error):
            raise
        raise CopyRefusedError(first_line(error)) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        is_copy = str(error.response.request.url).split("?")[0].endswith("/lfs-files/duplicate")
        if not is_copy or status in (401, 408, 429) or status >= 500:
            raise
        raise CopyRefusedError(_server_message(error)) from None


def _explain(error: BaseException, what: str) -> str:
    from huggingface_hub import errors

    if getattr(error, "response", None) is not None:  # the Hub answered; older clients may raise another error
        return _explain_status(error, what)
    if isinstance(error, errors.LocalTokenNotFoundError):
        return "no Hub token; log in (`hf auth login`), set HF_TOKEN, or give --token"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, but a push needs the Hub; unset it"
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        return _explain(error.__cause__, what)  # the client wraps errors of an upload like this
    if isinstance(error, ValueError) and "LFS batch API" in str(error):
        return f"the Hub does not accept the files of {what}: {str(error).strip().splitlines()[-1].split('`')[-1]}"
    if isinstance(error, OSError) and getattr(error, "filename", None):
        return f"cannot read {error.filename}: {error.strerror}"
    if isinstance(error, (ValueError, RuntimeError)):
        return f"the Hub client refuses: {one_line(error)}"
    return f"the connection to the Hub broke ({first_line(error)}); check the network and {AGAIN}"


def _explain_status(error: Any, what: str) -> str:
    status, message = error.response.status_code, _server_message(error)
    if status == 401:
        return (
            "the Hub does not accept the token: it is wrong, expired or revoked; "
            "log in again (`hf auth login`), or set HF_TOKEN or --token"
        )
    if status in (402, 413, 507) or "storage" in message or "quota" in message:
        return f"the Hub does not accept the files of {what}: {message}"
    if status == 403:
        return (
            f"you may not write to {what} ({message}); "
            "use a token with write permission, a namespace of your own, or --create-pr"
        )
    if status == 404:
        return f"there is no {what} on the Hub that you can see ({message}); check its name and your token"
    if status in (409, 412):
        return f"{what} is being changed by someone else ({message}); run the same command again"
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        return f"the Hub limits your requests ({message}); wait {f'{wait} s' if wait else 'a while'} and {AGAIN}"
    if status >= 500:
        return f"the Hub has an error of its own ({status}: {message}); {AGAIN}"
    return f"the Hub refused {what} ({status}: {message})"


def _server_message(error: Any) -> str:
    """The Hub's own message, in one line."""
    message = getattr(error, "server_message", None) or error.response.headers.get("X-Error-Message") or str(error)
    return one_line(message)


def _read_export(api: HfApi, repo_id: str, revision: str, files: dict) -> tuple[str | None, Manifest | None]:
    """Card and manifest of a repository; None for one that it does not have."""
    with tempfile.TemporaryDirectory() as folder:
        for name in (CARD, MANIFEST):
            if name in files:
                api.hf_hub_download(repo_id, name, revision=revision, local_dir=folder)
        card = Path(folder, CARD)
        try:
            manifest = read_manifest(Path(folder))
        except ExportError:
            manifest = None
        return (card.read_bytes().decode("utf-8", errors="replace") if card.exists() else None), manifest


def _remote_file(entry: Any) -> RemoteFile:
    sha256 = entry.lfs.sha256 if entry.lfs else None
    is_copyable = sha256 is not None and bool(getattr(entry, "xet_hash", None))
    return RemoteFile(entry.size, entry.blob_id, sha256, is_copyable)
