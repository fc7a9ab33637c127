"""Convert a base checkpoint into a self-contained looped model directory: plan first, then write all at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from loopexport._version import __version__
from loopexport.base.checkpoint import Checkpoint
from loopexport.base.download import find_checkpoint
from loopexport.base.families import layer_types
from loopexport.errors import OutputError, SpecError
from loopexport.files.digests import Progress, bytes_sha256, file_xxh3
from loopexport.files.placement import METHODS, place, settle_method
from loopexport.files.staged_directory import check_output, check_space, output_path, staged
from loopexport.loop.advice import loop_notices
from loopexport.loop.auto_span import AUTO, auto_span, why_auto_span
from loopexport.loop.cost import Cost, loop_cost
from loopexport.loop.presets import find_preset, preset_fields
from loopexport.loop.spec import LoopSpec, check_first_n, make_spec

from .directory import Export, is_export, open_export
from .manifest import MANIFEST, FileRecord, Manifest
from .small_files import base_file_notices, licence_notice_file, small_files

WITHOUT = "none"  # no weights are taken along; `push` lets the Hub copy the base's
WEIGHTS = (*METHODS, WITHOUT)


@dataclass(frozen=True)
class ConvertPlan:
    """What a conversion will do, decided and checked before anything is written.

    Attributes:
        base: the checkpoint to convert.
        out: the directory to write.
        spec, cost: the loop and what it costs.
        weights: how the weights will be put in place, one of `WEIGHTS`.
        overwrite: whether an export at `out` is to be replaced.
        warnings: what the user should know, one line each.
        files: the contents of all files of the export but weights and manifest, by name.
    """

    base: Checkpoint
    out: Path
    spec: LoopSpec
    cost: Cost
    weights: str
    overwrite: bool
    warnings: tuple[str, ...]
    files: dict[str, bytes] = field(repr=False)

    @property
    def max_disk_bytes(self) -> int:
        """Bytes that the weights will take at most; `auto` takes none where the file system can reflink."""
        return self.base.weight_bytes if self.weights in ("auto", "copy") else 0

    def to_dict(self) -> dict:
        """The plan for `--json`."""
        start, stop = self.spec.layers[0], self.spec.layers[-1] + 1
        return {
            "base": {"name": self.base.origin.name, "revision": self.base.origin.revision},
            "out": str(self.out),
            "model_type": self.base.model_type,
            "spec": {**self.spec.to_config_fields(), "loop_damping": self.spec.step_size},
            "layers": list(self.spec.layers),
            "depth_fraction": [round(start / self.base.num_layers, 4), round(stop / self.base.num_layers, 4)],
            "cost": self.cost.to_dict(),
            "weights": {
                "method": self.weights,
                "files": len(self.base.shards),
                "bytes": self.base.weight_bytes,
                "max_disk_bytes": self.max_disk_bytes,
            },
            "left_behind": list(self.base.left_behind),
            "warnings": list(self.warnings),
        }


def plan_convert(
    model: str,
    out: str | Path | None = None,
    *,
    revision: str | None = None,
    weights: str = "auto",
    overwrite: bool = False,
    dry_run: bool = False,
    preset: str | None = None,
    **spec,
) -> ConvertPlan:
    """Decide and check a conversion; writes nothing but the Hub's cache.

    Args:
        model: a local directory or a Hub id.
        out: the directory to write; None names it after base and spec, in the current directory.
        revision: branch, tag or commit of a Hub model.
        weights: how to put the weights in place, one of `WEIGHTS`.
        overwrite: replace an export that stands at `out`.
        dry_run: only the plan is wanted, so weights that are not local yet are not downloaded.
        preset: name of a published cell whose fields are used where `spec` has none.
        **spec: the fields of `LoopSpec`: `span`, `steps`, `damping`, ...; span "auto" is a guess, see `heuristics`.

    Raises:
        LoopExportError: something is wrong; the message says what, and what to do.
    """
    fields = {**(preset_fields(preset) if preset is not None else {}), **spec}
    is_auto = fields.get("span") in (AUTO, (AUTO,), [AUTO])
    loop = make_spec(**{**fields, "span": (0, 1)} if is_auto else fields)  # wrong fields show before a base is sought
    check_first_n(loop, is_given="first_n" in fields)
    if weights not in WEIGHTS:
        raise OutputError(f"weights method {weights!r} must be one of {', '.join(WEIGHTS)}")
    base = find_checkpoint(str(model), revision, headers_only=dry_run or weights == WITHOUT)
    if weights == WITHOUT:
        _check_copyable(base)
    loop = make_spec(**{**fields, "span": auto_span(base)}) if is_auto else loop
    with _span_explained(preset if "span" not in spec else None):
        _check_layers(base, loop)
    out = output_path(out) if out is not None else _default_out(base, loop)
    check_output(out, base.root, overwrite=overwrite, is_replaceable=is_export)
    cost = loop_cost(base, loop)
    warnings = [
        *([why_auto_span(base)] if is_auto else []),
        *loop_notices(base, loop, find_preset(preset) if preset is not None else None),
        *base_file_notices(base),
    ]
    files = small_files(base, loop, cost, has_weights=weights != WITHOUT)
    return ConvertPlan(base, out, loop, cost, weights, overwrite, tuple(warnings), files)


def apply(plan: ConvertPlan, progress: Progress = lambda count: None) -> Export:
    """Carry out a plan: all of `plan.out` appears at once, or nothing does.

    Args:
        plan: from `plan_convert`.
        progress: called with the number of bytes of weights just copied.

    Raises:
        CheckpointError: a weights file of the base cannot be read.
        OutputError: the output cannot be written.
    """
    with staged(plan.out, replace=plan.overwrite) as root:
        files = {name: _write(root / name, content) for name, content in plan.files.items()}
        weights, method = _place_weights(plan, root, progress)
        manifest = Manifest(
            __version__,
            plan.base.origin,
            plan.spec,
            method,
            weights,
            files,
            plan.base.left_behind,
            tuple(licence_notice_file(plan.base)),
        )
        (root / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return open_export(plan.out)


def convert(model: str, out: str | Path | None = None, **options) -> Export:
    """Convert a model: `plan_convert` and `apply` in one, with the options of the former.

    Example:
        >>> convert("Qwen/Qwen3-4B", "qwen3-4b-looped", span=(15, 19), steps=3)  # doctest: +SKIP
    """
    return apply(plan_convert(model, out, **options))


def _default_out(base: Checkpoint, spec: LoopSpec) -> Path:
    name = base.origin.name.rsplit("/", 1)[-1]
    spans = "-".join(f"{start}-{stop}" for start, stop in spec.spans)
    return Path(f"{name}-looped-{spans}-k{spec.steps}")


@contextmanager
def _span_explained(preset: str | None) -> Iterator[None]:
    """Say where a span that does not fit came from, where the user did not give it."""
    try:
        yield
    except SpecError as error:
        if preset is None:
            raise
        cell = find_preset(preset)
        raise SpecError(
            f"{error}; that span is of preset {preset}, for {cell.model_type} with {cell.num_layers} layers: "
            "give one for this model with --span"
        ) from None


def _check_layers(base: Checkpoint, loop: LoopSpec) -> None:
    try:
        loop.check_depth(base.num_layers)
        loop.check_layer_types(layer_types(base.config))
    except ValueError as error:
        raise SpecError(str(error)) from None
    recurrent = [layer for layer in loop.layers if layer in base.recurrent_tensors]
    if recurrent:  # where the config does not tell the types of layers, the weights do
        layer = recurrent[0]
        raise SpecError(
            f"layer {layer} keeps more of the past than keys and values ({base.recurrent_tensors[layer]}), and cannot "
            "be run again: choose a span of attention layers"
        )


def _check_copyable(base: Checkpoint) -> None:
    """Check that `push` will be able to let the Hub copy the weights: it tells them by their sha256."""
    if base.origin.revision is None:
        raise OutputError(
            f"--weights none needs a base on the Hub, which has the weights; {base.origin.name} is a local directory"
        )
    unknown = [shard.name for shard in base.shards if shard.sha256 is None]
    if unknown:
        raise OutputError(f"--weights none needs the sha256 of {unknown[0]}, which the Hub does not tell; use copy")


def _write(path: Path, content: bytes) -> FileRecord:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return FileRecord(len(content), bytes_sha256(content))


def _place_weights(plan: ConvertPlan, root: Path, progress: Progress) -> tuple[dict[str, FileRecord], str]:
    """Put every shard in place; what is copied, and has no known sha256, is hashed in other threads meanwhile."""
    shards = plan.base.shards
    if plan.weights == WITHOUT:
        return {
            each.name: FileRecord(each.size, each.sha256, None, each.header.sha256 or None) for each in shards
        }, WITHOUT
    method = settle_method(plan.weights, shards[0].path, root)
    if method == "copy":
        check_space(plan.out, plan.base.weight_bytes)
    with ThreadPoolExecutor(os.cpu_count()) as hashing:
        digests = {}
        for shard in shards:
            if method == "copy" and shard.sha256 is None:
                digests[shard.name] = hashing.submit(file_xxh3, shard.path)
            place(shard.path, root / shard.name, method, progress)
            if (root / shard.name).stat().st_size != shard.size:
                raise OutputError(f"{shard.path} changed while it was read; run the same command again")
    xxh3 = {name: digest.result() for name, digest in digests.items()}
    return {
        each.name: FileRecord(each.size, each.sha256, xxh3.get(each.name), each.header.sha256) for each in shards
    }, method
