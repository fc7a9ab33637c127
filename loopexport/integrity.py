"""Is an export still what was written? Checks on its files alone, without loading the model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .checkpoint import CARD, CONFIG, read_json
from .errors import CheckpointError
from .export import BASE_FOLDER, Export, looped_config
from .manifest import FileRecord
from .safetensors_header import read_header
from .spec import make_spec
from .weights import Progress, sha256_of, xxh3_of

# Files that a user may edit: the card freely, the config in its loop fields.
EDITABLE = (CARD, CONFIG)


@dataclass(frozen=True)
class Check:
    """Outcome of one check.

    Attributes:
        name: the invariant, as a sentence.
        passed: True or False; None where the invariant does not apply, as `detail` explains.
        detail: what was seen.
        difference: the largest absolute difference that was measured, if the check measures one.
    """

    name: str
    passed: bool | None
    detail: str
    difference: float | None = None

    def to_dict(self) -> dict:
        """The outcome for `--json`."""
        return asdict(self)


def check_files(export: Export, *, full: bool = False, progress: Progress = lambda count: None) -> list[Check]:
    """Compare an export with its manifest.

    Args:
        export: what to check.
        full: hash all weights; otherwise their size and header are compared.
        progress: called with the number of weight bytes just hashed.
    """
    onnx = [_check_onnx(export, full, progress)] if export.manifest.onnx else []
    return [_check_small_files(export), _check_config(export), _check_weights(export, full, progress), *onnx]


def _check_small_files(export: Export) -> Check:
    name = "files are as written"
    records = {name: record for name, record in export.manifest.files.items() if name not in EDITABLE}
    for file, record in records.items():
        path = export.root / file
        if not path.is_file():
            return Check(name, False, f"{file} is missing")
        if sha256_of(path) != record.sha256:
            return Check(name, False, f"{file} has changed")
    return Check(name, True, f"{len(records)} compared by sha256")


def _check_config(export: Export) -> Check:
    """The config is the base's with our fields added, whatever their values are now."""
    name = "config is the base's plus the loop"
    try:
        base = read_json(export.root / BASE_FOLDER / CONFIG)
        expected = looped_config(base, export.spec)
    except (CheckpointError, KeyError) as error:
        return Check(name, False, str(error))
    changed = sorted(key for key in {*expected, *export.config} if expected.get(key) != export.config.get(key))
    if changed:
        return Check(name, False, f"config.json differs from the base's in {', '.join(changed)}")
    edited = "" if export.spec == export.manifest.spec else "; the loop was edited since the conversion"
    return Check(name, True, f"{len(base)} base fields{edited}")


def _check_weights(export: Export, full: bool, progress: Progress) -> Check:
    name = "weights are the base's"
    depths = set()
    for file, record in export.manifest.weights.items():
        path = export.root / file
        if not path.is_file():
            return Check(name, False, f"{file} is missing")
        changed, depth = _weights_changed(path, record, full, progress)
        if changed:
            return Check(name, False, f"{file} has changed ({changed})")
        depths.add(depth)
    return Check(name, True, f"{len(export.manifest.weights)} compared by {' and '.join(sorted(depths))}")


def _weights_changed(path: Path, record: FileRecord, full: bool, progress: Progress) -> tuple[str, str]:
    """What differs from the record, or an empty string, and how far the comparison went."""
    if path.stat().st_size != record.size:
        return "size", ""
    try:
        if read_header(path).sha256 != record.header_sha256:
            return "header", ""
    except CheckpointError as error:
        return str(error), ""
    if not full:
        return "", "size and header (--full hashes all)"
    if record.sha256 is not None:
        return ("sha256" if sha256_of(path, progress) != record.sha256 else ""), "sha256"
    if record.xxh3_128 is not None:
        return ("xxh3_128" if xxh3_of(path, progress) != record.xxh3_128 else ""), "xxh3_128"
    return "", "size and header (no digest is known: the weights were not copied)"


def _check_onnx(export: Export, full: bool, progress: Progress) -> Check:
    """Graphs and their data are as written; what they read of the weights is checked with the weights."""
    name = "ONNX files are as written"
    known = {*export.manifest.onnx, *export.manifest.weights}
    for file, record in export.manifest.onnx.items():
        path = export.root / file
        missing = sorted({file, *(record.data or ())} - {each for each in known if (export.root / each).is_file()})
        if missing:
            return Check(name, False, f"{missing[0]} is missing" + (f"; {file} needs it" if missing[0] != file else ""))
        if path.stat().st_size != record.size:
            return Check(name, False, f"{file} has changed (size)")
        if record.sha256 is not None and sha256_of(path) != record.sha256:
            return Check(name, False, f"{file} has changed (sha256)")
        if full and record.xxh3_128 is not None and xxh3_of(path, progress) != record.xxh3_128:
            return Check(name, False, f"{file} has changed (xxh3_128)")
    return Check(name, True, f"{len(export.manifest.onnx)} compared{_stale_graphs(export)}")


def _stale_graphs(export: Export) -> str:
    """The graphs hold the loop that the config had when they were made."""
    for file, record in export.manifest.onnx.items():
        if record.spec is not None and make_spec(**record.spec) != replace(export.spec, steps=record.steps or 1):
            return f"; the loop was edited since {file} was made, which still runs the older one"
    return ""
