"""An exported directory: how its config differs from the base's, and how to open one."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

from loopexport.base.checkpoint import CONFIG, Checkpoint, open_checkpoint, read_config, read_json
from loopexport.base.families import layer_count
from loopexport.errors import CheckpointError, ExportError
from loopexport.loop.cost import Cost, loop_cost
from loopexport.loop.spec import LoopSpec
from loopexport.templates.configuration_looped import MODEL_TYPE_PREFIX, auto_map
from loopexport.templates.looped_spec import FIELD_PREFIX

from .manifest import MANIFEST, Manifest, read_manifest

BASE_FOLDER = "base"  # originals of the base's files that the export replaces


def looped_config(config: dict, spec: LoopSpec) -> dict:
    """The base's raw config with the loop added; nothing else is touched, nothing re-serialised by transformers.

    Raises:
        CheckpointError: the config names no `model_type`, or has a field named like those of a loop.
    """
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"config.json names no model_type but {config.get('model_type')!r}")
    loop = spec.to_config_fields()
    foreign = [name for name in config if name.startswith(FIELD_PREFIX) and name not in loop]
    if foreign:
        raise CheckpointError(
            f"the base's config.json has {foreign[0]}, and a looped model takes names with {FIELD_PREFIX} for fields "
            "of its loop; take it out there if the model does not need it"
        )
    entries = auto_map(config["model_type"])
    added = {
        "model_type": MODEL_TYPE_PREFIX + config["model_type"],
        "architectures": [entries["AutoModelForCausalLM"].split(".")[1]],
        "auto_map": entries,
        **loop,
    }
    return {**config, **added}


@dataclass(frozen=True)
class Export:
    """An export on disk.

    Attributes:
        root: its directory.
        manifest: what it was made from and of.
        config: its `config.json` as it is now.
    """

    root: Path
    manifest: Manifest
    config: dict

    @cached_property
    def spec(self) -> LoopSpec:
        """The loop that the export runs now: `config.json` may have been edited since it was converted."""
        self._check_field_names()
        try:
            spec = LoopSpec.from_config(SimpleNamespace(**self.config))
            spec.check_depth(layer_count(self.config) or 0)
            return spec
        except ValueError as error:
            raise ExportError(f"{self.root / CONFIG} holds an impossible loop: {error}") from None

    def _check_field_names(self) -> None:
        known = list(self.manifest.spec.to_config_fields())
        for name in self.config:
            if name.startswith(FIELD_PREFIX) and name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ExportError(f"{self.root / CONFIG} has {name}, which is no field of the loop{hint}")

    @property
    def edited(self) -> dict[str, tuple]:
        """What was edited of the loop since the conversion: was and is, by field of `LoopSpec`."""
        pairs = {
            each.name: (getattr(self.manifest.spec, each.name), getattr(self.spec, each.name))
            for each in fields(LoopSpec)
        }
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    @cached_property
    def base(self) -> Checkpoint:
        """The base checkpoint that the export holds: its own weights under the base's config."""
        config_path = self.root / BASE_FOLDER / CONFIG
        if self.lacking:  # nothing is known of the tensors then
            return Checkpoint(self.root, self.manifest.base, read_json(config_path), shards=(), carried=())
        return open_checkpoint(self.root, self.manifest.base, config_path=config_path)

    @cached_property
    def lacking(self) -> tuple[str, ...]:
        """Names of the weights files that are not here, as after a conversion that took none along."""
        return tuple(name for name in self.manifest.weights if not (self.root / name).exists())

    @property
    def cost(self) -> Cost:
        """What the loop costs per token."""
        return loop_cost(self.base, self.spec)


def open_export(root: str | Path) -> Export:
    """Open the export in a directory.

    Raises:
        ExportError: it is not one, or is damaged.
    """
    root = Path(os.path.expanduser(root))
    if not os.path.isdir(root):
        raise ExportError(f"no directory {root}, or none that can be read")
    manifest = read_manifest(root)
    try:
        return Export(root, manifest, read_config(root / CONFIG))
    except CheckpointError as error:
        raise ExportError(str(error)) from None


def is_export(root: Path) -> bool:
    """Whether a directory was written by LoopExport, in whatever format and state it is now."""
    try:
        return {"format", "loopexport"} <= read_json(root / MANIFEST).keys()
    except CheckpointError:
        return False
