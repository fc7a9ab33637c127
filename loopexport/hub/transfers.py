"""How each file of a push gets to the Hub: it is there already, the Hub copies it from the base, or we upload it."""

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
    """One file, and how it gets to the Hub.

    Attributes:
        name: its name in the export and in the repository.
        size: in bytes.
        how: `UPLOAD`: from this machine; `COPY`: by the Hub, from the base's repository; `THERE`: the repository has it
            already; `DELETE`: the export pushed before had it, this one does not.
        sha256: of the content; empty for a file to delete.
        content: the bytes, or the path of a file; None for a file to delete, and for weights that are not on this
            machine.
    """

    name: str
    size: int
    how: str
    sha256: str = ""
    content: bytes | Path | None = None

    def to_dict(self) -> dict:
        """The transfer for `--json`."""
        return {"name": self.name, "size": self.size, "how": self.how}


def weights_transfers(export: Export, progress: Progress) -> list[Transfer]:
    """Uploads of the weights files; each is hashed if it is on this machine, else the manifest gives its digest.

    Raises:
        ExportError: a weights file has changed since the conversion; convert the base again.
        PushError: a weights file is missing and has no digest in the manifest; convert the base again.
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
    """Uploads of large files from disk.

    Raises:
        ExportError: one of them has changed since it was written.
    """
    return [_large_transfer(export, name, progress) for name in names]


def _large_transfer(export: Export, name: str, progress: Progress) -> Transfer:
    path = export.root / name
    if name in export.manifest.onnx:
        return Transfer(name, export.manifest.onnx[name].size, UPLOAD, hash_onnx(export, name, progress), path)
    record = export.manifest.files[name]
    return Transfer(name, record.size, UPLOAD, record.sha256 or "", path)


def small_transfers(files: dict[str, bytes]) -> list[Transfer]:
    """Uploads of small files, given as contents by name."""
    return [Transfer(name, len(content), UPLOAD, bytes_sha256(content), content) for name, content in files.items()]


def settle_transfers(
    api: HfApi, export: Export, target: Target, transfers: list[Transfer], server_copy: bool
) -> tuple[list[Transfer], list[str]]:
    """Replace uploads by cheaper ways where possible; returns the transfers, and warnings about uploaded weights.

    Raises:
        PushError: weights are not on this machine and the Hub cannot copy them; convert the base again with weights.
    """
    items = [_if_there(item, target.files.get(item.name)) for item in transfers]
    at_base, reason = _list_base(api, export, target, [item.name for item in items if item.how == UPLOAD], server_copy)
    items = [_if_copyable(item, at_base.get(item.name)) for item in items]
    uploaded = [item for item in items if item.how == UPLOAD and item.name in export.manifest.weights]
    for item in uploaded:
        if item.content is None:
            raise PushError(_cannot_complete(item.name, reason, is_trained=export.manifest.trained))
    return items, [f"weights are uploaded, not copied by the Hub: {reason}"] if uploaded else []


def deletions(target: Target, names: set[str]) -> list[Transfer]:
    """Files of the export pushed before that this one does not have; left there, they could be loaded with this one."""
    stale = sorted((names_of(target.manifest) & set(target.files)) - names)
    return [Transfer(name, target.files[name].size, DELETE) for name in stale]


def uploaded_instead(transfer: Transfer, reason: str) -> Transfer:
    """The transfer as an upload, after the Hub refused to copy the file.

    Raises:
        PushError: the file is not on this machine.
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
    """The files of these names in the base's repository, and why the Hub cannot copy the others."""
    base = export.manifest.base
    if export.manifest.trained:
        return {}, "they were trained and are not the base's"
    reason = cannot_copy_from(base, target.repo_id) if server_copy else "--no-server-copy"
    if reason or not names or base.revision is None:
        return {}, reason
    try:
        files = list_files(api, base.name, base.revision, names)
    except HubError as error:
        return {}, str(error)
    return files, f"{base.name} at {base.revision[:12]} has no copyable file with these bytes"


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


def _cannot_complete(name: str, reason: str, is_trained: bool = False) -> str:
    remedy = "put it back" if is_trained else "convert the base again with its weights"
    return f"{name} is not here and the Hub cannot copy it ({reason}); {remedy}"
