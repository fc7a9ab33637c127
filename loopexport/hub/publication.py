"""Publish an export on the Hub: plan first, then change the repository in one commit.

`push` sends as few bytes as possible: files that are in the repository stay, the Hub copies what the base's repository
has, and `push` uploads only the rest.

The card follows one rule: never overwrite what somebody wrote. `push` regenerates README.md unless someone has edited
it. If the card on the Hub is still the one pushed last (its manifest shows this), the new card replaces it. Otherwise
`push` keeps that card's text and metadata, and only adds missing metadata.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from loopexport._keywords import suggest_keywords
from loopexport._version import __version__
from loopexport.base.checkpoint import CARD, INDEX, SINGLE_FILE
from loopexport.base.licence import licence_warnings
from loopexport.errors import PushError
from loopexport.export.card import merge_card, published_card, read_metadata
from loopexport.export.directory import Export, open_export
from loopexport.export.manifest import MANIFEST, FileRecord
from loopexport.export.onnx_files import graph_name
from loopexport.export.small_files import export_card, is_card_edited
from loopexport.files.digests import Progress, bytes_sha256

from .allowlist import AllowedFiles, allowed_files
from .repository import MAIN, CopyRefusedError, Target, commit, connect, create_missing, read_target
from .transfers import (
    COPY,
    DELETE,
    THERE,
    UPLOAD,
    Transfer,
    deletions,
    large_transfers,
    names_of,
    settle_transfers,
    small_transfers,
    uploaded_instead,
    weights_transfers,
)

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Notify = Callable[[str], object]

# Files that transformers and optimum load from a repository by default.
LOADED_UNASKED = (SINGLE_FILE, INDEX, "adapter_config.json", graph_name(1, 1))


@dataclass(frozen=True)
class PushResult:
    """The result of a push, or of its dry run.

    Attributes:
        url: the page of the repository, branch or pull request.
        commit: the commit that holds the export; None for a dry run.
        transfers: all files, and how each one travelled.
    """

    url: str
    commit: str | None
    transfers: tuple[Transfer, ...]

    def bytes_by(self, how: str) -> int:
        """Size of all files that travelled in one way. The Hub may ask for fewer bytes if it knows some already."""
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


@dataclass(frozen=True)
class PushPlan:
    """A push that is checked and ready. `apply` carries it out, `preview` only predicts the result.

    Attributes:
        api: the Hub's client.
        export: the export to push.
        target: the repository and branch.
        transfers: all files, and how each one travels.
        staying: names of files in the export's directory that are not pushed.
        warnings: one line each.
        private, create_pr, message: as given to `plan_push`.
    """

    api: HfApi
    export: Export
    target: Target
    transfers: tuple[Transfer, ...]
    staying: tuple[str, ...]
    warnings: tuple[str, ...]
    private: bool
    create_pr: bool
    message: str

    @property
    def url(self) -> str:
        """The page of the repository or branch."""
        url = f"{self.api.endpoint}/{self.target.repo_id}"
        return url if self.target.revision == MAIN else f"{url}/tree/{self.target.revision}"

    def preview(self) -> PushResult:
        """The result to expect from `apply`, for a dry run."""
        return PushResult(self.url, None, self.transfers)

    def apply(self, notify: Notify = lambda line: None) -> PushResult:
        """Push. One commit makes the whole export visible, or nothing changes.

        Args:
            notify: called with each line to show during the push.

        Raises:
            PushError: the Hub cannot copy weights that are not on this machine.
            HubError: the Hub refused or cannot be reached; the same push can be repeated.
        """
        is_there = self.target.has_branch or self.create_pr
        if is_there and all(transfer.how == THERE for transfer in self.transfers):
            return PushResult(self.url, self.target.head, self.transfers)
        create_missing(self.api, self.target, private=self.private)
        transfers = self.transfers
        try:
            done, pr_url = _commit(self, transfers)
        except CopyRefusedError as refusal:
            transfers = tuple(uploaded_instead(transfer, str(refusal)) for transfer in transfers)
            notify(f"the Hub does not copy from {self.export.manifest.base.name} ({refusal}): uploading instead")
            done, pr_url = _commit(self, transfers)
        return PushResult(pr_url or self.url, done, transfers)


@suggest_keywords
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
    """Decide and check a push. Reads the export and asks the Hub, but sends nothing.

    Args:
        root: the export.
        repo_id: the repository, `namespace/name`, or a name in your own namespace. `push` creates it if necessary.
        revision: the branch; None for main. `push` creates it if necessary.
        private: make a new repository private.
        create_pr: open a pull request instead of changing the branch.
        commit_message: the message of the commit; None for a standard one.
        token: a Hub token; None for `HF_TOKEN` or the saved login.
        server_copy: let the Hub copy weights from the base's repository.
        progress: called with the number of weight bytes just hashed.

    Raises:
        ExportError: `root` is not an intact export.
        PushError: the export holds something that must not be pushed, or does not fit the repository.
        HubError: the Hub refused or cannot be reached.
    """
    export = open_export(root)
    allowed = allowed_files(export)
    api, target = find_target(repo_id, revision=revision, private=private, create_pr=create_pr, token=token)
    _check_foreign_weights(export, target)
    heavy = [*weights_transfers(export, progress), *large_transfers(export, allowed.large, progress)]
    files, about_card = _settle_card(export, allowed.small, target)
    wanted = [*heavy, *small_transfers(files)]
    transfers, about_weights = settle_transfers(api, export, target, wanted, server_copy)
    return PushPlan(
        api=api,
        export=export,
        target=target,
        transfers=(*transfers, *deletions(target, {transfer.name for transfer in transfers})),
        staying=allowed.staying,
        warnings=(*about_card, *about_weights, *_about_links(export), *_about_licence(allowed, files[CARD], target)),
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
    """Look at the repository of a push before any other work.

    Args:
        repo_id, revision, private, create_pr, token: as for `plan_push`.

    Raises:
        PushError: the options do not fit the repository.
        HubError: the Hub refused or cannot be reached.
    """
    _check_options(repo_id, revision, create_pr)
    api, user = connect(token)
    repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
    target = read_target(api, repo_id, revision or MAIN, needs_write=not create_pr)
    if private and target.is_private is False:
        raise PushError(
            f"{target.repo_id} exists and is public, and --private only works for new repositories; "
            "make it private in its settings, or leave out --private"
        )
    return api, target


@suggest_keywords
def push(
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
    notify: Notify = lambda line: None,
) -> PushResult:
    """Publish an export: `plan_push(...).apply(notify)`.

    Example:
        >>> push("qwen3-4b-looped", "me/Qwen3-4B-looped", private=True)  # doctest: +SKIP

    Args:
        root: the export.
        repo_id: the repository, `namespace/name`, or a name in your own namespace. `push` creates it if necessary.
        revision: the branch; None for main. `push` creates it if necessary.
        private: make a new repository private.
        create_pr: open a pull request instead of changing the branch.
        commit_message: the message of the commit; None for a standard one.
        token: a Hub token; None for `HF_TOKEN` or the saved login.
        server_copy: let the Hub copy weights from the base's repository.
        progress: called with the number of weight bytes just hashed.
        notify: called with each warning of the plan, and with each line to show during the push.

    Raises:
        ExportError: `root` is not an intact export.
        PushError: the export holds something that must not be pushed, or does not fit the repository.
        HubError: the Hub refused or cannot be reached.
    """
    plan = plan_push(
        root,
        repo_id,
        revision=revision,
        private=private,
        create_pr=create_pr,
        commit_message=commit_message,
        token=token,
        server_copy=server_copy,
        progress=progress,
    )
    for warning in plan.warnings:
        notify(warning)
    return plan.apply(notify)


def _check_options(repo_id: str, revision: str | None, create_pr: bool) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PushError(f"{repo_id!r} is not a repository id such as me/name: {error}") from None
    if create_pr and revision not in (None, MAIN):
        raise PushError(f"--create-pr proposes a change to {MAIN}; leave out --revision {revision}")


def _about_links(export: Export) -> list[str]:
    """Say that linked weights have no recorded digest, where the base came without one."""
    weights = export.manifest.weights.items()
    unknown = [name for name, record in weights if record.sha256 is None and record.xxh3_128 is None]
    if not unknown or export.lacking:
        return []
    return [
        f"{unknown[0]} is a link to the base's file and has no recorded digest: only its size and header were compared"
    ]


def _about_licence(allowed: AllowedFiles, card: bytes, target: Target) -> list[str]:
    metadata = read_metadata(card.decode("utf-8", errors="replace"))
    names = [*allowed.small, *allowed.large]
    return licence_warnings(metadata, names, target.repo_id.rsplit("/", 1)[-1])


def _check_foreign_weights(export: Export, target: Target) -> None:
    ours = names_of(export.manifest) | names_of(target.manifest)
    foreign = [name for name in LOADED_UNASKED if name in target.files and name not in ours]
    if foreign:
        raise PushError(
            f"{target.repo_id} holds {foreign[0]} of another model, and transformers would load it with this one; "
            "choose another repository or --revision, or delete that file there first"
        )


def _settle_card(export: Export, files: dict[str, bytes], target: Target) -> tuple[dict[str, bytes], list[str]]:
    """The small files, with card and manifest as published, and warnings about the card."""
    ours = published_card(_own_card(export, files), target.repo_id)
    last = target.manifest.files.get(CARD) if target.manifest else None
    is_edited = target.card is not None and (last is None or last.sha256 != bytes_sha256(target.card.encode()))
    if is_edited and target.card is not None and target.card != ours:
        card, record = merge_card(ours, target.card), last or _record(ours.encode())
        warnings = [f"{CARD} was edited on the Hub: its text there stays, and the export's is not pushed"]
    else:
        card, record, warnings = ours, _record(ours.encode()), []
    manifest = replace(
        export.manifest,
        weights_method="copy" if export.lacking else export.manifest.weights_method,
        files={**export.manifest.files, CARD: record},
    )
    content = files[MANIFEST] if manifest == export.manifest else manifest.to_json().encode()
    return {**files, CARD: card.encode(), MANIFEST: content}, warnings


def _own_card(export: Export, files: dict[str, bytes]) -> str:
    return files[CARD].decode("utf-8", errors="replace") if is_card_edited(export) else export_card(export)


def _record(content: bytes) -> FileRecord:
    return FileRecord(len(content), bytes_sha256(content))


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
