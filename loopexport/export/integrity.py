"""Check that the files of an export have not changed since they were written, without loading the model."""

from __future__ import annotations

import json
import os
from pathlib import Path

from loopexport.base.checkpoint import CARD, CONFIG, LICENCE_TEXT, file_names, read_config
from loopexport.base.safetensors_header import read_header
from loopexport.errors import CheckpointError, ExportError
from loopexport.files.digests import Progress, file_digests, file_sha256, file_xxh3

from .check import Check
from .directory import BASE_FOLDER, Export, is_own_auto_map, looped_config
from .foreign_files import foreign_files
from .manifest import FileRecord, OnnxRecord
from .onnx_files import options_for
from .own_code import code_files
from .results_file import RESULTS, measured

WITHOUT_WEIGHTS = (
    "converted with --weights none; `loopexport push` adds the weights on the Hub, or convert again without that option"
)

# Files that the user may edit: all of the card, and the loop fields of the config.
EDITABLE = (CARD, CONFIG)

MAX_LISTED = 8  # foreign files that a check names

UNKNOWN_DIGEST = "size and header (linked weights have no recorded digest)"


def check_files(export: Export, *, full: bool = False, progress: Progress = lambda count: None) -> list[Check]:
    """Compare an export with its manifest.

    Args:
        export: what to check.
        full: hash all weights; otherwise compare only their sizes and headers.
        progress: called with the number of bytes just hashed.
    """
    return [
        check_small_files(export),
        check_config(export),
        _check_weights(export, full, progress),
        _check_records(export),
        *([check_onnx(export, full=full, progress=progress)] if export.manifest.onnx else []),
        *([_check_results(export)] if RESULTS in export.manifest.files else []),
    ]


def check_small_files(export: Export) -> Check:
    """Check that all files but weights, card and config have the recorded digests."""
    name = "files are as written"
    records = {name: record for name, record in export.manifest.files.items() if name not in EDITABLE}
    for file, record in records.items():
        path = export.root / file
        if not os.path.isfile(path):
            return Check(name, False, f"{file} is missing")
        if file_sha256(path) != record.sha256:
            return Check(name, False, f"{file} has changed")
    return Check(name, True, f"{len(records)} compared by sha256")


def check_config(export: Export) -> Check:
    """Check that the config is the base's plus the loop fields, with any values."""
    name = f"config is the {'native model' if export.manifest.trained else 'base'}'s plus the loop"
    try:
        base = read_config(export.root / BASE_FOLDER / CONFIG)
        expected = looped_config(base, export.spec, mlx=export.runs_on_mlx)
    except CheckpointError as error:
        return Check(name, False, str(error))
    if is_own_auto_map(export.config.get("auto_map"), base["model_type"]):
        expected["auto_map"] = export.config["auto_map"]  # earlier code had fewer entries
    # As JSON text: there NaN equals NaN, and true, 1.0 and 1 differ.
    expected, actual = ({key: json.dumps(value) for key, value in each.items()} for each in (expected, export.config))
    changed = sorted(key for key in {*expected, *actual} if expected.get(key) != actual.get(key))
    if changed:
        return Check(name, False, f"config.json differs from the base's in {', '.join(changed)}")
    edited = "" if export.spec == export.manifest.spec else "; the loop was edited since the conversion"
    return Check(name, True, f"{len(base)} base fields{edited}")


def _check_results(export: Export) -> Check:
    """Check that the measured results can be read, and say how many are of this loop."""
    name = "measured results are intact"
    try:
        results = measured(export)
    except ExportError as error:
        return Check(name, False, str(error))
    other = f", {len(results.other)} of another loop" if results.other else ""
    return Check(name, True, f"{len(results.own)} of this loop{other}")


def hash_weights(export: Export, name: str, progress: Progress = lambda count: None) -> str:
    """Check a weights file against its record in the manifest and return its sha256.

    Raises:
        ExportError: the file has changed; convert the base or adopt the trained model again.
    """
    path, record = export.root / name, export.manifest.weights[name]
    changed, _ = _weights_changed(path, record, full=False, progress=progress)
    if changed:
        raise ExportError(f"{name} in {export.root} has changed ({changed}); {export.manifest.remedy}")
    return _hash(path, record, progress, export.manifest.remedy)


def hash_onnx(export: Export, name: str, progress: Progress = lambda count: None) -> str:
    """Check an ONNX file against its record in the manifest and return its sha256.

    Raises:
        ExportError: the file has changed; the message says how to export it again.
    """
    return _hash(export.root / name, export.manifest.onnx[name], progress, onnx_remedy(export, name))


def onnx_remedy(export: Export, name: str) -> str:
    """How to get an intact ONNX file again: the command that writes it, or a graph that reads it."""
    graphs = {each: record for each, record in export.manifest.onnx.items() if record.steps is not None}
    graph = next((each for each in graphs if name == each or name in (graphs[each].data or ())), None)
    options = "" if graph is None else options_for(graph, graphs[graph].quantisation)
    return f"run `loopexport onnx {export.root}{options}` to export it again"


def _hash(path: Path, record: FileRecord | OnnxRecord, progress: Progress, remedy: str) -> str:
    sha256, xxh3 = file_digests(path, progress)
    known = {"sha256": (record.sha256, sha256), "xxh3_128": (record.xxh3_128, xxh3)}
    for kind, (was, now) in known.items():
        if was not in (None, now):
            raise ExportError(f"{path.name} in {path.parent} has changed ({kind}); {remedy}")
    return sha256


def _check_weights(export: Export, full: bool, progress: Progress) -> Check:
    name = _weights_claim(export, full)
    if export.lacking and export.manifest.weights_method == "none":
        return Check(name, False, f"{export.lacking[0]} is not here: {WITHOUT_WEIGHTS}")
    depths: dict[str, None] = {}
    for file, record in export.manifest.weights.items():
        path = export.root / file
        if not os.path.isfile(path):
            return Check(name, False, f"{file} is missing")
        changed, depth = _weights_changed(path, record, full, progress)
        if changed:
            return Check(name, False, f"{file} has changed ({changed})")
        depths[depth] = None
    is_proved = not full or UNKNOWN_DIGEST not in depths
    detail = f"{len(export.manifest.weights)} compared by {' and '.join(depths)}"
    return Check(name, True if is_proved else None, detail)


def _weights_claim(export: Export, full: bool) -> str:
    if export.manifest.trained:
        return "weights are as recorded" if full else "weights have the recorded sizes and headers"
    return "weights are the base's" if full else "weights have the base's sizes and headers"


def _check_records(export: Export) -> Check:
    """Check that the manifest records every file that belongs to the model, and that no runtime would load another."""
    name = "the manifest knows every file"
    try:
        base = export.base
        originals = {f"{BASE_FOLDER}/{each}" for each in file_names(export.root / BASE_FOLDER)}
    except CheckpointError as error:
        return Check(name, False, str(error))
    foreign = foreign_files(export)
    if foreign.loaded:
        detail = f"not part of the export, but a runtime may load it: {listed(foreign.loaded)}; move it elsewhere"
        return Check(name, False, detail)
    if foreign.links:
        why = "symbolic links that are not part of the export and may point anywhere"
        return Check(name, False, f"{why}: {listed(foreign.links)}; replace them with files, or remove them")
    carried = (each for each in base.carried if not LICENCE_TEXT.fullmatch(each))  # its owner may add one
    needed = {CONFIG, CARD, *code_files(export.root), *carried, *originals}
    unknown = sorted(needed - export.manifest.files.keys())
    unknown += sorted(({shard.name for shard in base.shards} ^ export.manifest.weights.keys()) - {*export.lacking})
    if unknown:
        return Check(name, False, f"{unknown[0]} is not recorded in it, or is not part of the model")
    others = f"; not part of the export: {listed(foreign.others)}" if foreign.others else ""
    return Check(name, True, f"{len(needed)} small files, {len(base.shards)} with weights{others}")


def listed(names: tuple[str, ...]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - MAX_LISTED
    shown = ", ".join(name if name.isprintable() else repr(name) for name in names[:MAX_LISTED])
    return shown + (f" and {more} more" if more > 0 else "")


def _weights_changed(path: Path, record: FileRecord, full: bool, progress: Progress) -> tuple[str, str]:
    """What differs from the record (empty for nothing), and what was compared."""
    if path.stat().st_size != record.size:
        return "size", ""
    try:
        header_sha256 = read_header(path).sha256
    except CheckpointError as error:
        return str(error), ""
    if record.header_sha256 not in (None, header_sha256):
        return "header", ""
    if not full:
        return "", f"size{' and header' if record.header_sha256 else ''} (--full hashes all)"
    if record.sha256 is not None:
        return ("sha256" if file_sha256(path, progress) != record.sha256 else ""), "sha256"
    if record.xxh3_128 is not None:
        return ("xxh3_128" if file_xxh3(path, progress) != record.xxh3_128 else ""), "xxh3_128"
    return "", UNKNOWN_DIGEST


def check_onnx(
    export: Export, *, full: bool = False, needs_weights: bool = True, progress: Progress = lambda count: None
) -> Check:
    """Check that ONNX graphs and their data files have not changed; `check_files` checks the weights that they read.

    Args:
        export: what to check.
        full: hash all data files; otherwise compare only their sizes.
        needs_weights: whether the weights files that the graphs read must be here.
        progress: called with the number of bytes just hashed.
    """
    name = "ONNX files are as written"
    here = {each for each in {*export.manifest.onnx, *export.manifest.weights} if (export.root / each).is_file()}
    here |= set() if needs_weights else {*export.manifest.weights}
    for file, record in export.manifest.onnx.items():
        missing = sorted({file, *(record.data or ())} - here)
        if missing:
            lost = missing[0]
            needs = "" if lost == file else f"; {file} needs it"
            remedy = f"; {onnx_remedy(export, lost)}" if lost in export.manifest.onnx else ""
            return Check(name, False, f"{lost} is missing{needs}{remedy}")
        changed = _onnx_changed(export.root / file, record, full, progress)
        if changed:
            return Check(name, False, f"{file} has changed ({changed}); {onnx_remedy(export, file)}")
    return Check(name, True, f"{len(export.manifest.onnx)} compared")


def _onnx_changed(path: Path, record: OnnxRecord, full: bool, progress: Progress) -> str:
    """What differs from the record; empty for nothing."""
    if path.stat().st_size != record.size:
        return "size"
    if record.sha256 is not None and file_sha256(path) != record.sha256:
        return "sha256"
    if full and record.xxh3_128 is not None and file_xxh3(path, progress) != record.xxh3_128:
        return "xxh3_128"
    return ""
