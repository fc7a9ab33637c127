"""How each file of a push gets to the Hub: it is there already, the Hub copies it from the base, or it is uploaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from loopexport.errors import HubError, PushError
from loopexport.export.directory import Export
from loopexport.export.integrity import hash_onnx, hash_weights
from loopexport.export.manifest import Manifest
from loopexport.files.digests import Progress, bytes_sha256, git_blob_id

from .repository import RemoteFile, Target, cannot_copy_from, list_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi

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


def weights_transfers(export: Export, progress: Progress) -> list[Transfer]:
    """The weights, each with its true digest; of those that are not here, the one that the manifest tells.

    Raises:
        ExportError: a weights file is not what was written.
        PushError: one is missing, and nothing is known of it.
    """
    transfers = []
    for name, record in export.manifest.weights.items():
        if name not in export.lacking:
            sha256 = hash_weights(export, name, progress)
            transfers.append(Transfer(name, record.size, UPLOAD, sha256, export.root / name))
        elif record.sha256 is not None:
            transfers.append(Transfer(name, record.size, UPLOAD, record.sha256))
        else:
            raise PushError(f"{name} is missing in {export.root}; convert the base again")
    return transfers


def large_transfers(export: Export, names: tuple[str, ...], progress: Progress) -> list[Transfer]:
    """Files that are sent from the disk.

    Raises:
        ExportError: one of them is not what was written.
    """
    return [_large_transfer(export, name, progress) for name in names]


def _large_transfer(export: Export, name: str, progress: Progress) -> Transfer:
    path = export.root / name
    if name in export.manifest.onnx:
        return Transfer(name, export.manifest.onnx[name].size, UPLOAD, hash_onnx(export, name, progress), path)
    record = export.manifest.files[name]
    return Transfer(name, record.size, UPLOAD, record.sha256 or "", path)


def small_transfers(files: dict[str, bytes]) -> list[Transfer]:
    """Files whose content is given, by name."""
    return [Transfer(name, len(content), UPLOAD, bytes_sha256(content), content) for name, content in files.items()]


def settle_transfers(
    api: HfApi, export: Export, target: Target, transfers: list[Transfer], server_copy: bool
) -> tuple[list[Transfer], list[str]]:
    """How each file gets there, and what to tell of weights that have to be uploaded.

    Raises:
        PushError: weights are neither here nor where the Hub could copy them from.
    """
    items = [_if_there(item, target.files.get(item.name)) for item in transfers]
    at_base, reason = _list_base(api, export, target, [item.name for item in items if item.how == UPLOAD], server_copy)
    items = [_if_copyable(item, at_base.get(item.name)) for item in items]
    uploaded = [item for item in items if item.how == UPLOAD and item.name in export.manifest.weights]
    for item in uploaded:
        if item.content is None:
            raise PushError(_cannot_complete(item.name, reason))
    return items, [f"weights are uploaded, not copied on the Hub: {reason}"] if uploaded else []


def deletions(target: Target, names: set[str]) -> list[Transfer]:
    """What the export that was pushed before had, and this one has not: it would be loaded, or mistaken for ours."""
    stale = sorted((names_of(target.manifest) & set(target.files)) - names)
    return [Transfer(name, target.files[name].size, DELETE) for name in stale]


def uploaded_instead(transfer: Transfer, reason: str) -> Transfer:
    """A file that the Hub does not copy after all.

    Raises:
        PushError: it is not here.
    """
    if transfer.how != COPY:
        return transfer
    if transfer.content is None:
        raise PushError(_cannot_complete(transfer.name, reason))
    return replace(transfer, how=UPLOAD)


def names_of(manifest: Manifest | None) -> set[str]:
    """Names of all files that a manifest lists."""
    return set() if manifest is None else {*manifest.weights, *manifest.files, *manifest.onnx}


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
