"""Publish an export on the Hub: plan first, then change the repository in one commit.

No byte travels that need not: what the repository has already stays, what the base's repository has is copied there by
the Hub itself, and only the rest is uploaded.

The card follows one rule: what somebody wrote into README.md on the Hub stays. As long as it is there as it was pushed
last (the manifest beside it tells), it is replaced by the export's; otherwise its text and metadata are kept, and only
metadata that it lacks is added.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__
from .card import merge_card, published_card, read_metadata
from .checkpoint import CARD, INDEX, SINGLE_FILE
from .errors import HubError, PushError
from .export import Export, open_export
from .integrity import hash_weights
from .licence import licence_warnings
from .manifest import MANIFEST, FileRecord, Manifest
from .outgoing import collect, git_blob_id
from .remote import (
    MAIN,
    CopyRefusedError,
    RemoteFile,
    Target,
    cannot_copy_from,
    commit,
    connect,
    list_files,
    look_at,
    prepare,
)
from .weights import Progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from huggingface_hub import HfApi

# What transformers loads from a repository without being asked to, whatever else is there.
LOADED_UNASKED = (SINGLE_FILE, INDEX, "adapter_config.json")

UPLOAD, COPY, THERE, DELETE = "uploaded", "copied", "there", "deleted"


@dataclass(frozen=True)
class Transfer:
    """One file and how it gets to the Hub.

    Attributes:
        name: its name, here and there.
        size: in bytes.
        how: `UPLOAD`; `COPY`, by the Hub from the base's repository; `THERE`, the repository has it; or `DELETE`, it
            belonged to the export that was pushed before and not to this one.
        sha256: of its content; empty for what is deleted.
        content: the bytes, or the file that holds them; None for what is deleted, and for weights that are not here.
    """

    name: str
    size: int
    how: str
    sha256: str = ""
    content: bytes | Path | None = None

    def to_dict(self) -> dict:
        """The file for `--json`."""
        return {"name": self.name, "size": self.size, "how": self.how}


@dataclass(frozen=True)
class PushPlan:
    """What a push will do, decided and checked before anything is sent.

    Attributes:
        api: the Hub's client.
        export: what is pushed.
        target: where to.
        transfers: all files, and how each gets there.
        staying: names of files in the export's directory that stay behind.
        notices: what the user should know, one line each.
        private, create_pr, message: as given to `plan_push`.
    """

    api: HfApi
    export: Export
    target: Target
    transfers: tuple[Transfer, ...]
    staying: tuple[str, ...]
    notices: tuple[str, ...]
    private: bool
    create_pr: bool
    message: str

    @property
    def url(self) -> str:
        """Where the export will be seen."""
        url = f"{self.api.endpoint}/{self.target.repo_id}"
        return url if self.target.revision == MAIN else f"{url}/tree/{self.target.revision}"


@dataclass(frozen=True)
class PushResult:
    """What a push did, or would do.

    Attributes:
        url: where to look at it: the repository, its branch, or the pull request.
        commit: the commit that holds the export; None where nothing was sent.
        transfers: all files, and how each got there.
    """

    url: str
    commit: str | None
    transfers: tuple[Transfer, ...]

    def bytes_by(self, how: str) -> int:
        """Size of all files that got there in one way; the Hub may need fewer bytes, of what it knows already."""
        return sum(transfer.size for transfer in self.transfers if transfer.how == how)

    def to_dict(self) -> dict:
        """The result for `--json`."""
        return {
            "url": self.url,
            "commit": self.commit,
            "files": [transfer.to_dict() for transfer in self.transfers],
            "bytes_uploaded": self.bytes_by(UPLOAD),
            "bytes_copied": self.bytes_by(COPY),
        }


def plan_push(
    root: str | Path,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    server_copy: bool = True,
    progress: Progress = lambda count: None,
) -> PushPlan:
    """Decide and check a push; reads the export and asks the Hub, but sends nothing.

    Args:
        root: the export.
        repo_id: the repository, `namespace/name`, or a name in your own namespace; it need not exist.
        revision: the branch; it need not exist.
        private: make a new repository private.
        create_pr: open a pull request instead of changing the branch.
        commit_message: of the commit.
        token: a Hub token; None takes `HF_TOKEN` or the saved login.
        server_copy: let the Hub copy what the base's repository has.
        progress: called with the number of weight bytes just hashed.

    Raises:
        ExportError: `root` is no export, or not an intact one.
        PushError: something in it must not leave, or does not fit the repository.
        HubError: the Hub refused, or cannot be reached.
    """
    export = open_export(root)
    outgoing = collect(export)
    api, target = find_target(repo_id, revision=revision, private=private, create_pr=create_pr, token=token)
    _check_foreign_weights(export, target)
    files, notices = _settle_card(export, outgoing.files, target)
    items = [*_weights_items(export, progress), *_large_items(export, outgoing.large), *_file_items(files)]
    transfers, more = _settle_transfers(api, export, target, items, server_copy)
    metadata = read_metadata(files[CARD].decode("utf-8", errors="replace"))
    more += _stale_card(export, outgoing.files[CARD])
    more += licence_warnings(metadata, [*files, *outgoing.large], target.repo_id.rsplit("/", 1)[-1])
    return PushPlan(
        api=api,
        export=export,
        target=target,
        transfers=(*transfers, *_deletions(target, {transfer.name for transfer in transfers})),
        staying=outgoing.staying,
        notices=(*notices, *more),
        private=private,
        create_pr=create_pr,
        message=commit_message or f"Upload {export.manifest.base.name}, looped by LoopExport {__version__}",
    )


def find_target(
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    token: str | None = None,
) -> tuple[HfApi, Target]:
    """Look at where a push goes to, with the options of `plan_push`, before any work is done for it.

    Raises:
        PushError: these options do not fit the repository.
        HubError: the Hub refused, or cannot be reached.
    """
    _check_options(repo_id, revision, create_pr)
    api, user = connect(token)
    repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
    target = look_at(api, repo_id, revision or MAIN, needs_write=not create_pr)
    if private and target.is_private is False:
        raise PushError(
            f"{target.repo_id} exists and is public, and --private is for new repositories; "
            "make it private in its settings, or leave out --private"
        )
    return api, target


def apply(plan: PushPlan, notify: Callable[[str], object] = lambda line: None) -> PushResult:
    """Carry out a plan: the whole export becomes visible with one commit, or nothing does.

    Args:
        plan: from `plan_push`.
        notify: called with a line that the user should see while it goes on.

    Raises:
        PushError: weights that are not here cannot be copied.
        HubError: the Hub refused, or cannot be reached; the same push can simply be made again.
    """
    if all(transfer.how == THERE for transfer in plan.transfers):
        return PushResult(plan.url, plan.target.head, plan.transfers)
    prepare(plan.api, plan.target, private=plan.private)
    transfers = plan.transfers
    try:
        done, pr_url = _commit(plan, transfers)
    except CopyRefusedError as refusal:
        transfers = tuple(_uploaded_instead(transfer, str(refusal)) for transfer in transfers)
        notify(f"the Hub does not copy from {plan.export.manifest.base.name} ({refusal}): uploading instead")
        done, pr_url = _commit(plan, transfers)
    return PushResult(pr_url or plan.url, done, transfers)


def planned(plan: PushPlan) -> PushResult:
    """What carrying out a plan is expected to do, for a dry run."""
    return PushResult(plan.url, None, plan.transfers)


def push(root: str | Path, repo_id: str, **options) -> PushResult:
    """Publish an export: `plan_push` and `apply` in one, with the options of the former.

    Example:
        >>> push("qwen3-4b-looped", "me/Qwen3-4B-looped", private=True)  # doctest: +SKIP
    """
    return apply(plan_push(root, repo_id, **options))


def _check_options(repo_id: str, revision: str | None, create_pr: bool) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PushError(f"{repo_id!r} is not an id of a repository, such as me/name: {error}") from None
    if create_pr and revision not in (None, MAIN):
        raise PushError(f"--create-pr proposes a change of {MAIN}; leave out --revision {revision}")


def _stale_card(export: Export, card: bytes) -> list[str]:
    """The notice that an untouched card tells of another loop than `config.json`, if it does."""
    if export.spec == export.manifest.spec or _sha256(card) != export.manifest.files[CARD].sha256:
        return []
    return [f"config.json holds another loop than was converted, and {CARD} tells of the converted one: correct it"]


def _check_foreign_weights(export: Export, target: Target) -> None:
    ours = {*export.manifest.weights, *export.manifest.files, *_names_pushed(target.manifest)}
    foreign = [name for name in LOADED_UNASKED if name in target.files and name not in ours]
    if foreign:
        raise PushError(
            f"{target.repo_id} holds {foreign[0]} of another model, which would be loaded as part of this one; "
            "choose another repository or --revision, or delete that file there first"
        )


def _names_pushed(manifest: Manifest | None) -> set[str]:
    return set() if manifest is None else {*manifest.weights, *manifest.files}


def _settle_card(export: Export, files: dict[str, bytes], target: Target) -> tuple[dict[str, bytes], list[str]]:
    """The small files with the card and the manifest as they are to be published, and what to tell of that."""
    ours = published_card(files[CARD].decode("utf-8", errors="replace"), target.repo_id)
    last = target.manifest.files.get(CARD) if target.manifest else None
    is_edited = target.card is not None and (last is None or last.sha256 != _sha256(target.card.encode()))
    if is_edited and target.card is not None and target.card != ours:
        card, record = merge_card(ours, target.card), last or _record(ours.encode())
        notices = [f"{CARD} was edited on the Hub: its text stays as it is there, whatever the export's says"]
    else:
        card, record, notices = ours, _record(ours.encode()), []
    manifest = replace(
        export.manifest,
        weights_method="copy" if export.lacking else export.manifest.weights_method,
        files={**export.manifest.files, CARD: record},
        onnx={},  # those files stay here: they are made anew where they are wanted
    )
    content = files[MANIFEST] if manifest == export.manifest else manifest.to_json().encode()
    return {**files, CARD: card.encode(), MANIFEST: content}, notices


def _record(content: bytes) -> FileRecord:
    return FileRecord(len(content), _sha256(content))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _weights_items(export: Export, progress: Progress) -> list[Transfer]:
    """The weights, each with its true digest; of those that are not here, the one that the manifest tells."""
    items = []
    for name, record in export.manifest.weights.items():
        if name not in export.lacking:
            sha256 = hash_weights(export, name, progress)
            items.append(Transfer(name, record.size, UPLOAD, sha256, export.root / name))
        elif record.sha256 is not None:
            items.append(Transfer(name, record.size, UPLOAD, record.sha256))
        else:
            raise PushError(f"{name} is missing in {export.root}; convert the base again")
    return items


def _large_items(export: Export, names: tuple[str, ...]) -> list[Transfer]:
    records = {name: export.manifest.files[name] for name in names}
    return [Transfer(name, each.size, UPLOAD, each.sha256 or "", export.root / name) for name, each in records.items()]


def _file_items(files: dict[str, bytes]) -> list[Transfer]:
    return [Transfer(name, len(content), UPLOAD, _sha256(content), content) for name, content in files.items()]


def _settle_transfers(
    api: HfApi, export: Export, target: Target, items: list[Transfer], server_copy: bool
) -> tuple[list[Transfer], list[str]]:
    """How each file gets there, and what to tell of weights that have to be uploaded."""
    items = [_if_there(item, target.files.get(item.name)) for item in items]
    at_base, reason = _list_base(api, export, target, [item.name for item in items if item.how == UPLOAD], server_copy)
    items = [_if_copyable(item, at_base.get(item.name)) for item in items]
    uploaded = [item for item in items if item.how == UPLOAD and item.name in export.manifest.weights]
    for item in uploaded:
        if item.content is None:
            raise PushError(_cannot_complete(item.name, reason))
    return items, [f"weights are uploaded, not copied on the Hub: {reason}"] if uploaded else []


def _list_base(
    api: HfApi, export: Export, target: Target, names: list[str], server_copy: bool
) -> tuple[dict[str, RemoteFile], str]:
    """What the base's repository has of these files, and why those that it lacks, or all, cannot be copied there."""
    base = export.manifest.base
    reason = cannot_copy_from(base, target.repo_id) if server_copy else "--no-server-copy"
    if reason or not names or base.revision is None:
        return {}, reason
    try:
        files = list_files(api, base.name, base.revision, names)
    except HubError as error:
        return {}, str(error)
    return files, f"{base.name} at {base.revision[:12]} does not have these bytes where they can be copied from"


def _if_there(item: Transfer, file: RemoteFile | None) -> Transfer:
    if file is None or file.size != item.size:
        return item
    if file.sha256 is not None:
        is_same = file.sha256 == item.sha256
    else:
        is_same = isinstance(item.content, bytes) and file.git_id == git_blob_id(item.content)
    return replace(item, how=THERE) if is_same else item


def _if_copyable(item: Transfer, file: RemoteFile | None) -> Transfer:
    is_copyable = item.how == UPLOAD and file is not None and file.is_copyable and file.sha256 == item.sha256
    return replace(item, how=COPY) if is_copyable else item


def _cannot_complete(name: str, reason: str) -> str:
    return f"{name} is not here and cannot be copied on the Hub ({reason}); convert the base again with its weights"


def _deletions(target: Target, names: set[str]) -> list[Transfer]:
    """What the export that was pushed before had, and this one has not: it would be loaded, or mistaken for ours."""
    stale = sorted((_names_pushed(target.manifest) & set(target.files)) - names)
    return [Transfer(name, target.files[name].size, DELETE) for name in stale]


def _uploaded_instead(transfer: Transfer, reason: str) -> Transfer:
    if transfer.how != COPY:
        return transfer
    if transfer.content is None:
        raise PushError(_cannot_complete(transfer.name, reason))
    return replace(transfer, how=UPLOAD)


def _commit(plan: PushPlan, transfers: tuple[Transfer, ...]) -> tuple[str, str | None]:
    return commit(
        plan.api,
        plan.target,
        plan.message,
        additions={
            each.name: (each.content, each.sha256)
            for each in transfers
            if each.how == UPLOAD and each.content is not None
        },
        copies=[each.name for each in transfers if each.how == COPY],
        base=plan.export.manifest.base,
        deletions=[each.name for each in transfers if each.how == DELETE],
        create_pr=plan.create_pr,
    )
