"""A repository on the Hub to be written to: what it holds, and one commit that changes it all at once."""

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
AGAIN = "run the same command again: files that arrived whole are not sent twice"


class CopyRefusedError(Exception):
    """The Hub does not copy files from the base; they have to be uploaded."""


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub lists it.

    Attributes:
        size: in bytes.
        git_id: the id of its content, for a regular file.
        sha256: of its content, for a large file, else None.
        is_copyable: whether the client can ask for a copy of it in another repository.
    """

    size: int
    git_id: str
    sha256: str | None
    is_copyable: bool


@dataclass(frozen=True)
class Target:
    """The repository and branch to write to, as it was when it was looked at.

    Attributes:
        repo_id, revision: which.
        exists, has_branch: whether they are there yet.
        is_private: whether the repository is private; None where it is not there yet.
        head: the commit that the branch points to or, if it is not there, will start from; None for a new repository.
        files: what that commit holds, by name.
        card: its model card; None if there is none.
        manifest: what was pushed last; None if the repository holds no export.
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
    """The Hub's client, and the name of the user whom the token belongs to.

    Raises:
        HubError: there is no token, or the Hub does not accept it.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="loopexport")
    with explained("your account"):
        return api, api.whoami()["name"]


def look_at(api: HfApi, repo_id: str, revision: str, *, needs_write: bool) -> Target:
    """What a repository holds now.

    Args:
        api: the client.
        repo_id, revision: repository and branch; they need not exist.
        needs_write: check that the user may write to the repository.

    Raises:
        HubError: the Hub refused, or cannot be reached.
    """
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    with explained(repo_id):
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
    """The files of a commit, all or those named, by name.

    Raises:
        HubError: the Hub refused, or cannot be reached.
    """
    with explained(repo_id):
        if names is None:
            entries = list(api.list_repo_tree(repo_id, recursive=True, revision=revision))
        else:
            entries = api.get_paths_info(repo_id, names, revision=revision)
    return {entry.path: _remote_file(entry) for entry in entries if hasattr(entry, "blob_id")}


def cannot_copy_from(base: Origin, repo_id: str) -> str:
    """Why the client cannot ask the Hub to copy files of a base; an empty string if it can."""
    from huggingface_hub import CommitOperationCopy

    if base.revision is None:
        return f"the base {base.name} is a local directory"
    if base.name != repo_id and "src_repo_id" not in inspect.signature(CommitOperationCopy).parameters:
        return "this huggingface_hub cannot copy between repositories; version 2 can"
    return ""


def prepare(api: HfApi, target: Target, *, private: bool) -> None:
    """Make sure that repository and branch exist.

    Raises:
        HubError: the Hub refused, or cannot be reached.
    """
    with explained(target.repo_id):
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
    """Upload what has to be uploaded, then change all files in one commit; its id, and the URL of the pull request.

    Args:
        api: the client.
        target: where to; if its branch has moved since it was looked at, nothing is changed.
        message: the commit's message.
        additions: content (bytes, or the file that holds it) and sha256, by name.
        copies: names of files that the Hub itself is to copy from `base`.
        base: a repository on the Hub, at a commit.
        deletions: names of files to be deleted.
        create_pr: propose the change in a pull request instead.

    Raises:
        CopyRefusedError: the Hub does not copy these files; nothing is changed.
        HubError: the Hub refused, or cannot be reached; nothing is changed, unless the answer was lost.
        PushError: the repository would drop a file; nothing is changed.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

    source: dict[str, Any] = {} if base.name == target.repo_id else {"src_repo_id": base.name, "src_repo_type": "model"}
    adding = [CommitOperationAdd(name, content) for name, (content, _) in additions.items()]
    for operation in adding:  # their digests are known, which saves a second pass over large files
        operation.upload_info.sha256 = bytes.fromhex(additions[operation.path_in_repo][1])
    operations: list[Any] = [
        *adding,
        *(CommitOperationCopy(name, name, src_revision=base.revision, **source) for name in copies),
        *(CommitOperationDelete(name) for name in deletions),
    ]
    where: dict[str, Any] = {"revision": target.revision, "create_pr": create_pr}
    with explained(target.repo_id), _copy_refusals():
        # Apart from the commit, because only here the repository's .gitignore can be kept from dropping files silently.
        api.preupload_lfs_files(target.repo_id, adding, gitignore_content="", **where)
        _check_none_dropped(adding, target)
        done = api.create_commit(target.repo_id, operations, commit_message=message, parent_commit=target.head, **where)
    return done.oid, done.pr_url


def _check_none_dropped(adding: list, target: Target) -> None:
    """The client says nowhere but in a private attribute that it is about to leave a file out of the commit."""
    dropped = [operation.path_in_repo for operation in adding if getattr(operation, "_should_ignore", False)]
    if dropped:
        raise PushError(f"the .gitignore of {target.repo_id} drops {dropped[0]}; take that line out of it first")


@contextmanager
def explained(what: str):
    """Turn what the Hub's client raises into a `HubError` of one line that says what to do.

    Args:
        what: the repository in question, for the message.
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

    if getattr(error, "response", None) is not None:  # an answer; older clients do not always raise their own kind
        return _explain_status(error, what)
    if isinstance(error, errors.LocalTokenNotFoundError):
        return "there is no Hub token; log in (`hf auth login`), set HF_TOKEN, or give --token"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and a push needs the Hub; unset it"
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        return _explain(error.__cause__, what)  # so the client wraps what stopped an upload
    if isinstance(error, ValueError) and "LFS batch API" in str(error):
        return f"the Hub does not take the files of {what}: {str(error).strip().splitlines()[-1].split('`')[-1]}"
    if isinstance(error, OSError) and getattr(error, "filename", None):
        return f"cannot read {error.filename}: {error.strerror}"
    if isinstance(error, (ValueError, RuntimeError)):
        return f"the Hub's client refuses: {one_line(error)}"
    return f"the connection to the Hub broke ({first_line(error)}); check the network and {AGAIN}"


def _explain_status(error: Any, what: str) -> str:
    status, message = error.response.status_code, _server_message(error)
    if status == 401:
        return (
            "the Hub does not accept the token: it is mistyped, expired or revoked; "
            "log in again (`hf auth login`), or set HF_TOKEN or --token"
        )
    if status in (402, 413, 507) or "storage" in message or "quota" in message:
        return f"the Hub does not take the files of {what}: {message}"
    if status == 403:
        return (
            f"you may not write to {what} ({message}); "
            "use a token with write permission, a namespace of your own, or --create-pr"
        )
    if status == 404:
        return f"the Hub has no {what} that you can see ({message}); check its name and your token"
    if status in (409, 412):
        return f"{what} is being changed by someone else ({message}); run the same command again"
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        return (
            f"the Hub limits how often you may ask ({message}); wait {f'{wait} s' if wait else 'a while'} and {AGAIN}"
        )
    if status >= 500:
        return f"the Hub is in trouble ({status}: {message}); {AGAIN}"
    return f"the Hub refused {what} ({status}: {message})"


def _server_message(error: Any) -> str:
    """What the Hub itself says, in a line."""
    message = getattr(error, "server_message", None) or error.response.headers.get("X-Error-Message") or str(error)
    return one_line(message)


def _read_export(api: HfApi, repo_id: str, revision: str, files: dict) -> tuple[str | None, Manifest | None]:
    """Card and manifest of a repository, as far as it has them."""
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
