"""Make an export of a directory that `save_pretrained` of a looped model wrote after training: plan, then write."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from loopexport._keywords import suggest_keywords
from loopexport._version import __version__
from loopexport.base import processor, tokenizer
from loopexport.base.checkpoint import CARD, CONFIG, Checkpoint, Origin, open_checkpoint, read_config
from loopexport.base.licence import licence_warnings
from loopexport.files.digests import Progress, bytes_sha256, file_sha256
from loopexport.files.staged_files import exactly, staged_files
from loopexport.loop.cost import Cost, loop_cost
from loopexport.loop.spec import LoopSpec
from loopexport.templates.looped_mlx_limits import MODEL_FILE

from .adopted_base import BaseFiles, find_base_files
from .card import read_metadata, with_licence
from .card_refresh import write_card_and_manifest
from .directory import BASE_FOLDER, MODEL_FILE_FIELD, Export, looped_config, open_export
from .manifest import IN_PLACE, MANIFEST, FileRecord, Manifest
from .small_files import notice_file, read_file, without_foreign_code
from .trained_model import (
    check_directory,
    check_model,
    native_config,
    own_code,
    read_loop,
    trained_card,
    training_files,
)


@dataclass(frozen=True)
class AdoptPlan:
    """An adoption that is checked and ready. `apply` carries it out.

    Attributes:
        root: the directory to adopt.
        base: the trained native model in it.
        spec, cost: the loop and its cost.
        warnings: one line each.
        files: the content of every small file of the export by name, without the card and the manifest.
        removed: names of files that move to `base/`.
        added: names of files that the trained model does not have, such as a NOTICE.
    """

    root: Path
    base: Checkpoint
    spec: LoopSpec
    cost: Cost
    warnings: tuple[str, ...]
    files: dict[str, bytes] = field(repr=False)
    removed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()

    @property
    def written(self) -> tuple[str, ...]:
        """Names of the small files that `apply` writes, without the card and the manifest."""
        return tuple(name for name, content in sorted(self.files.items()) if not _holds(self.root / name, content))

    def to_dict(self) -> dict:
        """The plan for `--json`."""
        return {
            "directory": str(self.root),
            "base": self.base.origin.name,
            "model_type": self.base.model_type,
            "spec": {**self.spec.to_config_fields(), "loop_damping": self.spec.step_size},
            "cost": self.cost.to_dict(),
            "weights": {"files": len(self.base.shards), "bytes": self.base.weight_bytes},
            "files_written": list(self.written),
            "files_moved": list(self.removed),
            "warnings": list(self.warnings),
        }

    def apply(self, progress: Progress = lambda count: None) -> Export:
        """Write the manifest, the card and the files in `base/`. All of them appear, or nothing changes.

        Args:
            progress: called with the number of weight bytes just hashed.

        Raises:
            CheckpointError: a weights file cannot be read.
            OutputError: the directory cannot be written.
        """
        weights = {
            shard.name: FileRecord(shard.size, file_sha256(shard.path, progress), header_sha256=shard.header.sha256)
            for shard in self.base.shards
        }
        records = {name: FileRecord(len(content), bytes_sha256(content)) for name, content in self.files.items()}
        if (self.root / CARD).is_file():  # its text moves to `base/`, and ours takes its place
            records[CARD] = FileRecord((self.root / CARD).stat().st_size, file_sha256(self.root / CARD))
        manifest = Manifest(
            __version__, self.base.origin, self.spec, IN_PLACE, weights, records, added=self.added, trained=True
        )
        names = exactly(*self.removed, *self.written, CARD, MANIFEST)
        with staged_files(self.root, names, last=MANIFEST) as staged:
            for name in self.removed:
                staged.remove(name)
            for name in self.written:
                staged.write(name, self.files[name])
            write_card_and_manifest(Export(self.root, manifest, read_config(self.root / CONFIG)), staged)
            staged.keep()
        return open_export(self.root)


@suggest_keywords
def plan_adopt(root: str | Path, *, base: str | Path | None = None) -> AdoptPlan:
    """Decide and check an adoption. Writes nothing, and does not use the network.

    Args:
        root: the directory that `save_pretrained` of the trained looped model wrote.
        base: the model that was trained: a Hub id, a directory, or an export. It gives the name and the licence on the
            card, and the tokenizer and the processor where `root` has none. None takes the name from `root`.

    Raises:
        ExportError: the directory cannot be adopted; the message says what to do.
        CheckpointError: its weights or its config cannot be read, `base` does not exist, or it is another model.
    """
    root = Path(os.path.expanduser(root))
    check_directory(root)
    config = read_config(root / CONFIG)
    spec = read_loop(root, config)
    source = find_base_files(base, root, config)
    model = open_checkpoint(root, Origin(source.name), config=native_config(root, config))
    check_model(model, spec)
    code = own_code(root)
    files, removed, added = _small_files(model, config, spec, source)
    warnings = tuple(_warnings(model, source, files))
    return AdoptPlan(root, model, spec, loop_cost(model, spec), warnings, files | code, removed, added)


@suggest_keywords
def adopt(root: str | Path, *, base: str | Path | None = None, progress: Progress = lambda count: None) -> Export:
    """Make an export of a trained looped model, in place: `plan_adopt(...).apply(progress)`.

    Example:
        >>> adopt("qwen3-4b-looped-tuned", base="Qwen/Qwen3-4B")  # doctest: +SKIP

    Args:
        root: the directory that `save_pretrained` of the trained looped model wrote.
        base: the model that was trained: a Hub id, a directory, or an export. It gives the name and the licence on the
            card, and the tokenizer and the processor where `root` has none. None takes the name from `root`.
        progress: called with the number of weight bytes just hashed.

    Raises:
        ExportError: the directory cannot be adopted; the message says what to do.
        CheckpointError: its weights or its config cannot be read, `base` does not exist, or it is another model.
        OutputError: the directory cannot be written.
    """
    return plan_adopt(root, base=base).apply(progress)


def _small_files(
    model: Checkpoint, config: dict, spec: LoopSpec, source: BaseFiles
) -> tuple[dict[str, bytes], tuple[str, ...], tuple[str, ...]]:
    """The small files of the export but its code, the names that leave the top directory, and the names added."""
    own = {name: read_file(model.root / name) for name in model.carried}
    files = {**source.missing(own), **own}
    looped = looped_config(model.config, spec, mlx=config.get(MODEL_FILE_FIELD) == MODEL_FILE)
    files[CONFIG] = read_file(model.root / CONFIG) if _text(looped) == _text(config) else _json(looped)
    card = with_licence(trained_card(model.root), source.card)
    originals = {CONFIG: _json(model.config), **({CARD: card.encode()} if card else {})}
    originals |= without_foreign_code(files)
    notice = notice_file(read_metadata(card), files)
    removed = tuple(sorted(own.keys() - files.keys()))
    files |= notice | {f"{BASE_FOLDER}/{name}": content for name, content in originals.items()}
    return files, removed, tuple(notice)


def _warnings(model: Checkpoint, source: BaseFiles, files: dict[str, bytes]) -> Iterator[str]:
    """What the user should know, one line each."""
    for name in training_files(model.root)[:1]:
        yield f"{name} may be a pickle, and `push` stops at it: move it and other files of the training elsewhere"
    lacking = " and no ".join(_lacking(model, {name.removeprefix(f"{BASE_FOLDER}/") for name in files}))
    if lacking:
        yield (
            f"there is no {lacking}, and a file added later is not part of the export: give the base's directory with "
            "--base, or save it here before you adopt"
        )
    original = files.get(f"{BASE_FOLDER}/{tokenizer.CONFIG}", b"")
    if tokenizer.foreign_class(original) is not None:
        warning = tokenizer.tokenizer_warning(original, files, source.name, is_on_hub="/" in source.name)
        yield from filter(None, [warning])
    originals = {name: files.get(f"{BASE_FOLDER}/{name}", b"") for name in processor.NAMES}
    if processor.foreign_classes(originals):
        yield processor.foreign_code_warning(originals)
    if "rope_parameters" in model.config and "rope_theta" not in model.config:
        yield f"{CONFIG} was written by transformers 5: transformers 4 does not read rope_parameters and would differ"
    if model.config.get("use_cache") is False:
        yield (
            f"{CONFIG} has use_cache false, as gradient checkpointing leaves it, so `generate` runs without a K/V "
            "cache: set it to true before you adopt"
        )
    metadata = read_metadata(files.get(f"{BASE_FOLDER}/{CARD}", b"").decode("utf-8", errors="replace"))
    if "license" not in metadata:
        yield "no licence is known for the card: give the base's directory with --base, or edit README.md afterwards"
    yield from licence_warnings(metadata, list(files))


def _lacking(model: Checkpoint, names: Collection[str]) -> Iterator[str]:
    """What prepares the inputs of the model, but is not among the files."""
    if not any(map(tokenizer.FILES.fullmatch, names)):
        yield "tokenizer"
    if model.is_multimodal and not processor.has_processor(names):
        yield "processor"


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and read_file(path) == content


def _text(config: dict) -> str:
    """A config as text to compare: there NaN equals NaN, and true, 1.0 and 1 differ."""
    return json.dumps(config, sort_keys=True)


def _json(config: dict) -> bytes:
    return (json.dumps(config, indent=2) + "\n").encode()
