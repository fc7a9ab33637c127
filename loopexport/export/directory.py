"""An export on disk: how its config differs from the base's, and how to open it."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

from loopexport.base.checkpoint import (
    CARD,
    CARRIED,
    CARRYING_FOLDERS,
    CONFIG,
    Checkpoint,
    file_names,
    open_checkpoint,
    read_config,
    read_json,
)
from loopexport.base.families import check_family, is_multimodal, layer_count
from loopexport.errors import CheckpointError, ExportError
from loopexport.files.links import check_link, check_no_special_file
from loopexport.loop.cost import Cost, loop_cost
from loopexport.loop.spec import LoopSpec
from loopexport.templates.configuration_looped import MODEL_TYPE_PREFIX, auto_map
from loopexport.templates.looped_fit import check_depth
from loopexport.templates.looped_mlx_limits import MODEL_FILE
from loopexport.templates.looped_spec import FIELD_PREFIX, FIELDS

from .manifest import MANIFEST, Manifest, read_manifest

# The Auto classes that generate: from text alone, and from images, video or sound too.
TEXT_AUTO = "AutoModelForCausalLM"
MULTIMODAL_AUTO = "AutoModelForImageTextToText"

MODEL_FILE_FIELD = "model_file"  # the field of a config that names code for mlx-lm

BASE_FOLDER = "base"  # the folder for originals of the base's files that the export changes


def looped_config(config: dict, spec: LoopSpec, *, mlx: bool = False) -> dict:
    """The base's config with the loop added; every other value stays as the base has it.

    Only `model_file` is replaced or left out: it names code for mlx-lm, and an export has no code of the base.

    Args:
        config: the base's config.
        spec: the loop.
        mlx: whether mlx-lm may load the export.

    Raises:
        CheckpointError: the config has no `model_type`, or has a field with the prefix `loop_`.
    """
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"model_type {config.get('model_type')!r} in config.json is not a string such as 'llama'")
    loop = spec.to_config_fields()
    foreign = [name for name in config if name.startswith(FIELD_PREFIX) and name not in loop]
    if foreign:
        raise CheckpointError(
            f"the base's config.json has {foreign[0]}, but names with {FIELD_PREFIX} are reserved for the loop; remove "
            "it there if the model does not need it"
        )
    multimodal = is_multimodal(config)
    entries = auto_map(config["model_type"], multimodal)
    added = {
        "model_type": MODEL_TYPE_PREFIX + config["model_type"],
        "architectures": [entries[MULTIMODAL_AUTO if multimodal else TEXT_AUTO].split(".")[1]],
        "auto_map": entries,
        **loop,
        **({MODEL_FILE_FIELD: MODEL_FILE} if mlx else {}),
    }
    return {**{name: config[name] for name in config if name != MODEL_FILE_FIELD}, **added}


def is_own_auto_map(value: object, model_type: str) -> bool:
    """Whether a value is the `auto_map` of an export of a base family, by today's code or by earlier code.

    Earlier code had no classes for heads other than the language model's, and no multimodal ones.
    """
    ours = auto_map(model_type, is_multimodal=True)
    needed = ("AutoConfig", "AutoModel", TEXT_AUTO)
    return isinstance(value, dict) and value.items() <= ours.items() and all(name in value for name in needed)


@dataclass(frozen=True)
class Export:
    """An export on disk.

    Attributes:
        root: its directory.
        manifest: its manifest.
        config: the current content of its `config.json`.
    """

    root: Path
    manifest: Manifest
    config: dict

    @cached_property
    def spec(self) -> LoopSpec:
        """The loop in the current `config.json`, which the user may have edited since the conversion."""
        self._check_field_names()
        try:
            spec = LoopSpec.from_config(SimpleNamespace(**self.config))
            check_depth(spec, layer_count(self.config) or 0)
            return spec
        except ValueError as error:
            raise ExportError(f"{self.root / CONFIG} holds an impossible loop: {error}") from None

    @property
    def runs_on_mlx(self) -> bool:
        """Whether mlx-lm loads it."""
        return self.config.get(MODEL_FILE_FIELD) == MODEL_FILE

    def _check_field_names(self) -> None:
        known = [FIELD_PREFIX + name for name in FIELDS]
        for name in self.config:
            if name.startswith(FIELD_PREFIX) and name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else "; remove it"
                raise ExportError(f"{self.root / CONFIG} has {name}, which is not a field of the loop{hint}")

    @property
    def edited(self) -> dict[str, tuple]:
        """Edits of the loop since the conversion: `(old, new)` by field of `LoopSpec`."""
        pairs = {
            each.name: (getattr(self.manifest.spec, each.name), getattr(self.spec, each.name))
            for each in fields(LoopSpec)
        }
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    @cached_property
    def base(self) -> Checkpoint:
        """The base checkpoint inside the export: its weights with the base's config."""
        config_path = self.root / BASE_FOLDER / CONFIG
        if self.lacking:  # without weights there are no tensor headers to read
            config = read_config(config_path)
            check_family(config)
            return Checkpoint(self.root, self.manifest.base, config, shards=(), carried=())
        return open_checkpoint(self.root, self.manifest.base, config=read_config(config_path))

    @cached_property
    def lacking(self) -> tuple[str, ...]:
        """Names of the weights files that are missing here, as after `convert --weights none`."""
        return tuple(name for name in self.manifest.weights if not (self.root / name).exists())

    @property
    def cost(self) -> Cost:
        """The cost of the loop per token."""
        return loop_cost(self.base, self.spec)


def open_export(root: str | Path) -> Export:
    """Open the export in a directory.

    Raises:
        ExportError: the directory is not an export, or is damaged; the message says what to do.
    """
    root = Path(os.path.expanduser(root))
    if not os.path.isdir(root):
        raise ExportError(f"no directory {root}, or it is unreadable; give one that `loopexport convert` wrote")
    manifest = read_manifest(root)
    try:
        _check_files(root, manifest)
        return Export(root, manifest, read_config(root / CONFIG))
    except CheckpointError as error:
        raise ExportError(str(error)) from None


def _check_files(root: Path, manifest: Manifest) -> None:
    """Refuse special files, and links out of the directory among the files that commands read or copy."""
    for folder in (*CARRYING_FOLDERS, BASE_FOLDER):
        check_no_special_file(root / folder)
    extra = {name for name in file_names(root) if CARRIED.fullmatch(name) or name.startswith(f"{BASE_FOLDER}/")}
    for name in sorted({CONFIG, CARD, f"{BASE_FOLDER}/{CONFIG}", *manifest.files, *extra}):
        check_link(root, name)


def is_export(root: Path) -> bool:
    """Whether LoopExport wrote this directory, in any format and even if it is damaged now."""
    try:
        return {"format", "loopexport"} <= read_json(root / MANIFEST).keys()
    except CheckpointError:
        return False
