"""Publish an export on the Hub: plan first, then change the repository in one commit.

No byte travels that need not: what the repository has already stays, what the base's repository has is copied there by
the Hub itself, and only the rest is uploaded.

The card follows one rule: what somebody wrote stays. As long as nobody has edited README.md here, the card that goes is
made for the export as it is now. As long as it is on the Hub as it was pushed last (the manifest beside it tells), the
export's replaces it; otherwise the text and metadata there are kept, and only metadata that they lack is added.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

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
    from collections.abc import Callable

    from huggingface_hub import HfApi

# What transformers and optimum load from a repository without being asked to, whatever else is there.
LOADED_UNASKED = (SINGLE_FILE, INDEX, "adapter_config.json", graph_name(1, 1))


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
        notices=(*about_card, *about_weights, *_about_links(export), *_about_licence(allowed, files[CARD], target)),
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
    target = read_target(api, repo_id, revision or MAIN, needs_write=not create_pr)
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
    is_there = plan.target.has_branch or plan.create_pr
    if is_there and all(transfer.how == THERE for transfer in plan.transfers):
        return PushResult(plan.url, plan.target.head, plan.transfers)
    create_missing(plan.api, plan.target, private=plan.private)
    transfers = plan.transfers
    try:
        done, pr_url = _commit(plan, transfers)
    except CopyRefusedError as refusal:
        transfers = tuple(uploaded_instead(transfer, str(refusal)) for transfer in transfers)
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


def _about_links(export: Export) -> list[str]:
    """Weights that were linked have a digest only where the base came with one."""
    weights = export.manifest.weights.items()
    unknown = [name for name, record in weights if record.sha256 is None and record.xxh3_128 is None]
    if not unknown or export.lacking:
        return []
    return [
        f"no digest is known of {unknown[0]}, which was linked to the base's file: its size and header were compared"
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
            f"{target.repo_id} holds {foreign[0]} of another model, which would be loaded as part of this one; "
            "choose another repository or --revision, or delete that file there first"
        )


def _settle_card(export: Export, files: dict[str, bytes], target: Target) -> tuple[dict[str, bytes], list[str]]:
    """The small files with the card and the manifest as they are to be published, and what to tell of that."""
    ours = published_card(_own_card(export, files), target.repo_id)
    last = target.manifest.files.get(CARD) if target.manifest else None
    is_edited = target.card is not None and (last is None or last.sha256 != bytes_sha256(target.card.encode()))
    if is_edited and target.card is not None and target.card != ours:
        card, record = merge_card(ours, target.card), last or _record(ours.encode())
        notices = [f"{CARD} was edited on the Hub: its text stays as it is there, whatever the export's says"]
    else:
        card, record, notices = ours, _record(ours.encode()), []
    manifest = replace(
        export.manifest,
        weights_method="copy" if export.lacking else export.manifest.weights_method,
        files={**export.manifest.files, CARD: record},
    )
    content = files[MANIFEST] if manifest == export.manifest else manifest.to_json().encode()
    return {**files, CARD: card.encode(), MANIFEST: content}, notices


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
