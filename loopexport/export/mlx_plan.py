"""Plan to let mlx-lm load an export, and do it: `model_file` in its config names the file of its code for MLX."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from loopexport._keywords import suggest_keywords
from loopexport._version import __version__
from loopexport.base.checkpoint import CARD, CONFIG, Checkpoint
from loopexport.errors import ExportError
from loopexport.files.digests import bytes_sha256
from loopexport.files.staged_files import exactly, staged_files
from loopexport.loop.spec import LoopSpec
from loopexport.templates.looped_mlx_limits import MODEL_FILE

from .card_refresh import write_card_and_manifest
from .directory import MODEL_FILE_FIELD, Export, open_export
from .manifest import MANIFEST, FileRecord
from .mlx_families import mlx_refusal, mlx_warnings
from .own_code import code_set, foreign_code, todays_set

WEIGHTS_PATTERN = "model*.safetensors"  # the weights files that mlx-lm reads


@dataclass(frozen=True)
class MlxPlan:
    """A change of an export's config that is checked and ready. `apply` carries it out.

    Attributes:
        export: the export.
        is_current: whether mlx-lm loads it already.
        warnings: in what mlx-lm differs from transformers on the base, one line each.
    """

    export: Export
    is_current: bool

    @property
    def warnings(self) -> tuple[str, ...]:
        """In what mlx-lm differs from transformers on the base, one line each."""
        return tuple(mlx_warnings(self.export.base.config))

    def to_dict(self) -> dict:
        """The plan for `--json`."""
        return {
            "directory": str(self.export.root),
            "is_current": self.is_current,
            MODEL_FILE_FIELD: MODEL_FILE,
            "warnings": list(self.warnings),
        }

    def apply(self) -> bool:
        """Write config, card and manifest again. All of them change, or none.

        Returns:
            False if the card was edited and stays.

        Raises:
            OutputError: the directory cannot be written.
        """
        if self.is_current:
            return True
        config = {**self.export.config, MODEL_FILE_FIELD: MODEL_FILE}
        content = (json.dumps(config, indent=2) + "\n").encode()
        records = {**self.export.manifest.files, CONFIG: FileRecord(len(content), bytes_sha256(content))}
        manifest = replace(self.export.manifest, loopexport=__version__, files=records)
        with staged_files(self.export.root, exactly(CONFIG, CARD, MANIFEST), last=MANIFEST) as staged:
            staged.write(CONFIG, content)
            is_card_new = write_card_and_manifest(Export(self.export.root, manifest, config), staged)
            staged.keep()
        return is_card_new


@suggest_keywords
def plan_mlx(root: str | Path) -> MlxPlan:
    """Check whether mlx-lm can run an export. Writes nothing, and needs neither MLX nor mlx-lm.

    Example:
        >>> plan_mlx("qwen3-4b-looped").apply()  # doctest: +SKIP

    Args:
        root: the export.

    Raises:
        ExportError: `root` is no export or has other code, or mlx-lm cannot run its model or its loop.
    """
    export = open_export(root)
    code = code_set(export.root)
    foreign = foreign_code(export)
    if code is None or foreign is not None:
        raise ExportError(f"{foreign} in {export.root} was not written by LoopExport; convert the base again")
    if code != todays_set():
        raise ExportError(
            f"{export.root} was written by LoopExport {export.manifest.loopexport}, whose code does not run on MLX as "
            f"today's does; run `loopexport upgrade {export.root}` first"
        )
    reason = why_not_on_mlx(export.base, tuple(export.manifest.weights), export.spec)
    if reason is not None:
        raise ExportError(f"mlx-lm cannot run {export.root}: {reason}")
    return MlxPlan(export, export.runs_on_mlx)


def why_not_on_mlx(base: Checkpoint, weights: tuple[str, ...], spec: LoopSpec, prefix: str = "loop_") -> str | None:
    """Why mlx-lm cannot run a loop on a model, and what to do; None if it can.

    Args:
        base: the base.
        weights: names of its weights files.
        spec: the loop.
        prefix: what makes a setting out of the name of a field of the loop.
    """
    if base.is_multimodal:
        return "multimodal models were not tried there; convert the base with --text-only, or use transformers"
    other = next((name for name in weights if not fnmatchcase(name, WEIGHTS_PATTERN)), None)
    if other is not None:
        return (
            f"it reads only weights called {WEIGHTS_PATTERN}, not {other}; rename it in the base, or use transformers"
        )
    return mlx_refusal(base.config, spec, base.num_layers, prefix)
