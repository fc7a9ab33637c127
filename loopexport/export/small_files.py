"""The small files of an export: everything but weights, manifest and ONNX files, made in memory from the base."""

from __future__ import annotations

import json
import stat
import unicodedata
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from loopexport.base import processor, tokenizer
from loopexport.base.checkpoint import CARD, CONFIG, LICENCE_TEXT, Checkpoint, Origin
from loopexport.base.families import is_multimodal
from loopexport.base.licence import NOTICE, licence_of, licence_warnings
from loopexport.errors import CheckpointError
from loopexport.files.digests import file_sha256
from loopexport.loop.advice import loop_warnings
from loopexport.loop.cost import Cost
from loopexport.loop.presets import published_cell
from loopexport.loop.spec import LoopSpec
from loopexport.templates import FILES as TEMPLATES

from .card import CardFacts, make_card, read_metadata
from .directory import BASE_FOLDER, Export, looped_config
from .mlx_families import mlx_warnings
from .own_code import template_bytes
from .results_file import measured


def small_files(
    base: Checkpoint, spec: LoopSpec, cost: Cost, *, has_weights: bool, mlx: bool = False
) -> dict[str, bytes]:
    """Contents of the small files of a new export, by name.

    Raises:
        CheckpointError: a file of the base cannot be read.
    """
    _check_distinct(base.carried)
    files = {name: _content(base, name) for name in base.carried}
    originals = {name: _content(base, name) for name in (CONFIG, CARD) if (base.root / name).is_file()}
    files[CONFIG] = _looped_config(base, spec, mlx)
    home = tokenizer.tokenizer_home(_tokenizer_config(base), base.carried)
    facts = _card_facts(base, spec, cost, originals.get(CARD, b""), home, has_weights)
    facts = replace(facts, processor=processor.has_processor(base.carried), mlx=mlx)
    files[CARD] = make_card(facts).encode()
    originals |= without_foreign_code(files)
    files |= {name: template_bytes(name) for name in TEMPLATES} | licence_notice_file(base)
    return files | {f"{BASE_FOLDER}/{name}": content for name, content in originals.items()}


def _content(base: Checkpoint, name: str) -> bytes:
    return base.edited[name] if name in base.edited else read_file(base.root / name)


def without_foreign_code(files: dict[str, bytes]) -> dict[str, bytes]:
    """Edit `files`, contents by name, so that nothing needs code of the base; return the files it replaced."""
    originals = tokenizer.without_foreign_code(files)
    return processor.without_foreign_code(files) | originals


def _check_distinct(names: tuple[str, ...]) -> None:
    """Refuse names that are one name on macOS and Windows: one file would replace the other."""
    known: dict[str, str] = {}
    for name in names:
        other = known.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            raise CheckpointError(f"the base has both {other} and {name}, one name on some systems; remove one of them")


def export_card(export: Export) -> str:
    """A new card for the current state of an export: its loop, its weights, its ONNX files."""
    home = tokenizer.tokenizer_home(_original_tokenizer_config(export), _base_names(export))
    base_card = _original(export, CARD)
    facts = _card_facts(export.base, export.spec, export.cost, base_card, home, not export.lacking)
    facts = replace(facts, onnx=export.manifest.onnx, measured=measured(export), mlx=export.runs_on_mlx)
    facts = replace(facts, processor=processor.has_processor(_base_names(export)), text_only=export.manifest.text_only)
    if export.manifest.trained:  # results were published for the base's weights
        facts = replace(facts, trained=True, published=None)
    return make_card(facts)


def export_warnings(export: Export) -> list[str]:
    """What the user should know about the current state of an export, one line each, as `convert` prints it."""
    about_tokenizer = _about_tokenizer(_original_tokenizer_config(export), _base_names(export), export.manifest.base)
    metadata = read_metadata(_original(export, CARD).decode("utf-8", errors="replace"))
    return [
        *loop_warnings(export.base, export.spec),
        *filter(None, [about_tokenizer]),
        *_about_processor(export),
        *(mlx_warnings(export.base.config) if export.runs_on_mlx else ()),
        *licence_warnings(metadata, sorted(path.name for path in export.root.iterdir())),
    ]


def _about_processor(export: Export) -> list[str]:
    names = [name for name in processor.NAMES if name in _base_names(export)]
    files = {name: _original(export, name) or read_file(export.root / name) for name in names}
    return processor.processor_warnings(files, export.manifest.base.name) if is_multimodal(export.config) else []


def _original(export: Export, name: str) -> bytes:
    path = export.root / BASE_FOLDER / name
    return read_file(path) if path.is_file() else b""


def _original_tokenizer_config(export: Export) -> bytes:
    path = export.root / tokenizer.CONFIG
    return _original(export, tokenizer.CONFIG) or (read_file(path) if path.is_file() else b"")


def _base_names(export: Export) -> set[str]:
    """Names of the small files, including the originals in `base/`."""
    return {name.removeprefix(f"{BASE_FOLDER}/") for name in export.manifest.files}


def is_card_edited(export: Export) -> bool:
    """Whether someone has edited the card since LoopExport wrote it."""
    path, record = export.root / CARD, export.manifest.files.get(CARD)
    return path.is_file() and (record is None or file_sha256(path) != record.sha256)


def base_file_warnings(base: Checkpoint) -> list[str]:
    """What the user should know about the base's tokenizer, processor and licence, one line each."""
    about_tokenizer = _about_tokenizer(_tokenizer_config(base), base.carried, base.origin)
    small = {name: read_file(base.root / name) for name in base.carried if name in processor.NAMES}
    about_processor = processor.processor_warnings(small, base.origin.name) if base.is_multimodal else []
    return [*filter(None, [about_tokenizer]), *about_processor, *licence_warnings(_metadata(base), list(base.carried))]


def _about_tokenizer(config: bytes, names: Collection[str], base: Origin) -> str | None:
    return tokenizer.tokenizer_warning(config, names, base.name, is_on_hub=base.revision is not None)


def licence_notice_file(base: Checkpoint) -> dict[str, bytes]:
    """The NOTICE file that the base's licence requires, by name; empty if none is required or the base has one."""
    return notice_file(_metadata(base), base.carried)


def notice_file(metadata: dict, names: Collection[str]) -> dict[str, bytes]:
    """The NOTICE file that a licence requires, by name; empty if none is required or it is among `names`."""
    licence = licence_of(metadata)
    has_one = any(LICENCE_TEXT.fullmatch(name) and name.lower().startswith("notice") for name in names)
    return {} if licence is None or has_one else {NOTICE: f"{licence.notice_text}\n".encode()}


def _card_facts(
    base: Checkpoint, spec: LoopSpec, cost: Cost, base_card: bytes, home: tokenizer.Home, has_weights: bool
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
        tokenizer=home,
        has_weights=has_weights,
        config=base.config,
        text_only=bool(base.edited),
    )


def _looped_config(base: Checkpoint, spec: LoopSpec, mlx: bool) -> bytes:
    try:  # in ASCII, since a JSON string need not be valid text
        return (json.dumps(looped_config(base.config, spec, mlx=mlx), indent=2) + "\n").encode()
    except RecursionError:
        raise CheckpointError(f"{base.root / CONFIG} is nested too deeply; is it a Hugging Face config?") from None


def _metadata(base: Checkpoint) -> dict:
    path = base.root / CARD
    return read_metadata(read_file(path).decode("utf-8", errors="replace")) if path.is_file() else {}


def _tokenizer_config(base: Checkpoint) -> bytes:
    return read_file(base.root / tokenizer.CONFIG) if tokenizer.CONFIG in base.carried else b""


def read_file(path: Path) -> bytes:
    """The content of a small file.

    Raises:
        CheckpointError: it cannot be read, or is not a file.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would block
            raise CheckpointError(f"{path} is not a file")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
