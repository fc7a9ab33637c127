"""What an export holds beside the weights and the manifest, by name: worked out from the base, in memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from loopexport.base import tokenizer
from loopexport.base.checkpoint import CARD, CONFIG, LICENCE_TEXT, Checkpoint
from loopexport.base.licence import NOTICE, licence_of, licence_warnings
from loopexport.errors import CheckpointError
from loopexport.files.digests import file_sha256
from loopexport.loop.advice import notices
from loopexport.loop.cost import Cost
from loopexport.loop.presets import published_cell
from loopexport.loop.spec import LoopSpec
from loopexport.templates import FILES as TEMPLATES

from .card import CardFacts, make_card, read_metadata
from .directory import BASE_FOLDER, Export, looped_config
from .own_code import template_bytes


def small_files(base: Checkpoint, spec: LoopSpec, cost: Cost, *, has_weights: bool) -> dict[str, bytes]:
    """Contents of all files of the export but weights and manifest.

    Raises:
        CheckpointError: a file of the base cannot be read.
    """
    files = {name: _read(base.root / name) for name in base.carried}
    originals = {name: _read(base.root / name) for name in (CONFIG, CARD) if (base.root / name).is_file()}
    files[CONFIG] = _looped_config(base, spec)
    has_tokenizer = not tokenizer.is_left_out(_tokenizer_config(base), base.carried)
    facts = _card_facts(base, spec, cost, originals.get(CARD, b""), has_tokenizer, has_weights)
    files[CARD] = make_card(facts).encode()
    originals |= tokenizer.without_foreign_code(files)
    files |= {name: template_bytes(name) for name in TEMPLATES} | added_notice(base)
    return files | {f"{BASE_FOLDER}/{name}": content for name, content in originals.items()}


def export_card(export: Export) -> str:
    """The card of an export as it is now: its loop, its weights, its ONNX files."""
    has_tokenizer = not tokenizer.is_left_out(_original_tokenizer_config(export), _base_names(export))
    base_card = _original(export, CARD)
    facts = _card_facts(export.base, export.spec, export.cost, base_card, has_tokenizer, not export.lacking)
    return make_card(replace(facts, onnx=export.manifest.onnx))


def export_notices(export: Export) -> list[str]:
    """What a user should know of an export as it is now, as `convert` tells it of what it writes."""
    names = _base_names(export)
    about_tokenizer = tokenizer.notice(_original_tokenizer_config(export), names, export.manifest.base.name)
    metadata = read_metadata(_original(export, CARD).decode("utf-8", errors="replace"))
    return [
        *notices(export.base, export.spec),
        *filter(None, [about_tokenizer]),
        *licence_warnings(metadata, sorted(path.name for path in export.root.iterdir())),
    ]


def _original(export: Export, name: str) -> bytes:
    path = export.root / BASE_FOLDER / name
    return _read(path) if path.is_file() else b""


def _original_tokenizer_config(export: Export) -> bytes:
    path = export.root / tokenizer.CONFIG
    return _original(export, tokenizer.CONFIG) or (_read(path) if path.is_file() else b"")


def _base_names(export: Export) -> set[str]:
    """Names of the base's small files."""
    return {name.removeprefix(f"{BASE_FOLDER}/") for name in export.manifest.files}


def is_card_edited(export: Export) -> bool:
    """Whether somebody has changed the card since LoopExport wrote it."""
    path, record = export.root / CARD, export.manifest.files.get(CARD)
    return path.is_file() and (record is None or file_sha256(path) != record.sha256)


def small_file_notices(base: Checkpoint) -> list[str]:
    """What a user should know of the base's tokenizer and licence."""
    about_tokenizer = tokenizer.notice(_tokenizer_config(base), base.carried, base.origin.name)
    return [*filter(None, [about_tokenizer]), *licence_warnings(_metadata(base), list(base.carried))]


def added_notice(base: Checkpoint) -> dict[str, bytes]:
    """The notice that the base's licence demands, by its name, unless the base has one."""
    licence = licence_of(_metadata(base))
    has_one = any(LICENCE_TEXT.fullmatch(name) and name.lower().startswith("notice") for name in base.carried)
    return {} if licence is None or has_one else {NOTICE: f"{licence.notice}\n".encode()}


def _card_facts(
    base: Checkpoint, spec: LoopSpec, cost: Cost, base_card: bytes, has_tokenizer: bool, has_weights: bool
) -> CardFacts:
    return CardFacts(
        base.origin,
        base_card.decode("utf-8", errors="replace"),
        base.model_type,
        base.num_layers,
        spec,
        cost,
        published=published_cell(base, spec),
        quantisation=base.quantisation,
        has_tokenizer=has_tokenizer,
        has_weights=has_weights,
        config=base.config,
    )


def _looped_config(base: Checkpoint, spec: LoopSpec) -> bytes:
    try:  # in ASCII, which can spell whatever JSON can hold
        return (json.dumps(looped_config(base.config, spec), indent=2) + "\n").encode()
    except RecursionError:
        raise CheckpointError(f"{base.root / CONFIG} is nested too deeply") from None


def _metadata(base: Checkpoint) -> dict:
    path = base.root / CARD
    return read_metadata(_read(path).decode("utf-8", errors="replace")) if path.is_file() else {}


def _tokenizer_config(base: Checkpoint) -> bytes:
    return _read(base.root / tokenizer.CONFIG) if tokenizer.CONFIG in base.carried else b""


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
