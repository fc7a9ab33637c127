"""Convert a base checkpoint into a self-contained looped model directory: plan first, then write everything at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loopexport._keywords import suggest_keywords
from loopexport._version import __version__
from loopexport.base.checkpoint import Checkpoint
from loopexport.base.download import find_checkpoint
from loopexport.choices import DecodeMode, KvPolicy, LayerPath, Mode, RuleName, RysPair, Span, Weights
from loopexport.errors import OutputError, SpecError
from loopexport.files.digests import Progress, bytes_sha256
from loopexport.files.output import check_output, output_path
from loopexport.files.staged_directory import staged_directory
from loopexport.loop.cost import Cost, loop_cost
from loopexport.loop.spec import LoopSpec
from loopexport.templates.looped_path import joined_runs

from .base_loop import LoopSource
from .directory import Export, is_export, open_export
from .manifest import MANIFEST, FileRecord, Manifest
from .mlx_families import mlx_warnings
from .mlx_plan import why_not_on_mlx
from .replaced import check_replaceable, replacement_warnings
from .small_files import base_file_warnings, licence_notice_file, small_files
from .weights import METHODS, WITHOUT, check_method, copied_bytes, made_shards, place_weights

MAX_RUNS_NAME = 60  # characters for the layers in the name of a directory


@dataclass(frozen=True)
class ConvertPlan:
    """A conversion that is checked and ready. `apply` carries it out.

    Attributes:
        base: the checkpoint to convert.
        out: the directory to write.
        spec, cost: the loop and its cost.
        weights: how to put the weights in place.
        overwrite: whether to replace an existing export at `out`.
        warnings: one line each.
        files: the content of every file by name, without weights and manifest.
        mlx: whether mlx-lm may load it.
    """

    base: Checkpoint
    out: Path
    spec: LoopSpec
    cost: Cost
    weights: Weights
    overwrite: bool
    warnings: tuple[str, ...]
    files: dict[str, bytes] = field(repr=False)
    mlx: bool = False

    @property
    def text_only(self) -> bool:
        """Whether the base is the language model that was taken out of a multimodal model."""
        return bool(self.base.edited)

    @property
    def max_disk_bytes(self) -> int:
        """Disk space for the weights, at most; `auto` needs none where the file system can reflink."""
        return copied_bytes(self.base, self.weights)

    def to_dict(self) -> dict:
        """The plan for `--json`."""
        hull = [layer for body in self.spec.bodies for layer in body.hull]
        start, stop = min(hull, default=0), max(hull, default=-1) + 1
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
                "rewritten": [shard.name for shard in made_shards(self.base)],
            },
            "text_only": self.text_only,
            "mlx": self.mlx,
            "left_behind": list(self.base.left_behind),
            "warnings": list(self.warnings),
        }

    def apply(self, progress: Progress = lambda count: None) -> Export:
        """Write the export. The whole directory appears at once, or nothing does.

        Args:
            progress: called with the number of weight bytes just copied.

        Raises:
            CheckpointError: a weights file of the base cannot be read.
            OutputError: the output cannot be written.
        """
        with staged_directory(self.out, replace=self.overwrite) as root:
            files = {name: _write(root / name, content) for name, content in self.files.items()}
            weights, method = place_weights(self.base, root, self.weights, progress)
            manifest = Manifest(
                __version__,
                self.base.origin,
                self.spec,
                method,
                weights,
                files,
                self.base.left_behind,
                tuple(licence_notice_file(self.base)),
                text_only=self.text_only,
            )
            (root / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        return open_export(self.out)


@suggest_keywords
def plan_convert(
    model: str | Path,
    out: str | Path | None = None,
    *,
    span: Span | None = None,
    steps: int | Sequence[int] | None = None,
    damping: float | None = None,
    anchor: float | None = None,
    mode: Mode | None = None,
    kv: KvPolicy | None = None,
    decode: DecodeMode | None = None,
    first_n: int | None = None,
    rule: RuleName | None = None,
    schedule: str | Sequence[float] | None = None,
    momentum: float | None = None,
    history: int | None = None,
    frozen_routing: bool | None = None,
    norm_interpolation: bool | None = None,
    path: LayerPath | None = None,
    rys: RysPair | None = None,
    from_mergekit: str | Path | None = None,
    preset: str | None = None,
    revision: str | None = None,
    weights: Weights = "auto",
    without_adapter: bool = False,
    text_only: bool = False,
    mlx: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> ConvertPlan:
    """Decide and check a conversion. Writes nothing except the Hub's cache.

    A field of the loop that is None takes the preset's value, or else its default.

    Args:
        model: a local directory or a Hub id.
        out: the directory to write; None names it after the base, the span and K, in the current directory.
        span: the layers to loop, half-open, counted from 0: `(12, 20)` or "12:20"; a list for several spans, each
            with its own K if it is written as "12:20x3"; "auto" for a heuristic.
        steps: K, the number of steps; 1 is the base model. A list gives one for each span.
        damping: the step size s, in (0, 1]; 1 is naive looping.
        anchor: beta, the weight of the natural pass in the output, in [0, 1].
        mode: "block" loops the span as one function, "layer" loops each of its layers in turn.
        kv: which keys and values an iteration attends to: "shared", "per_step" or "reference".
        decode: which decode steps loop: "full" (all), "bypass" (none) or "first_n".
        first_n: the number of decode steps that loop, with `decode="first_n"`.
        rule: the update rule, a key of `RULES`.
        schedule: the numbers for rules ema_sched and poly_blend.
        momentum: for rule heavy_ball, in [0, 1).
        history: for rule anderson, the number of past differences to fit.
        frozen_routing: iterations use the experts that the natural pass chose.
        norm_interpolation: rescale each iterate to a norm between |x| and |n|.
        path: instead of a span, the layers that a token visits: "0-14,12-39" or half-open runs, ((0, 15), (12, 40)).
        rys: instead of a span, RYS's (i, j), which runs layers i to j-1 twice: steps 2, damping 1, kv "per_step".
        from_mergekit: instead of a span, a mergekit config with passthrough slices of one model.
        preset: the name of a published loop. It gives the fields that are not given here.
        revision: branch, tag or commit of a Hub model.
        weights: how to put the weights in place; "auto" is a reflink where the file system can, else a copy; "none"
            leaves the weights of a Hub model on the Hub, and `push` copies them there.
        without_adapter: ignore a PEFT adapter beside the weights, which transformers would load too.
        text_only: take the language model alone out of a multimodal model.
        mlx: let mlx-lm load the export too.
        overwrite: replace an existing export at `out`.
        dry_run: only plan, and do not download weights.

    Raises:
        LoopExportError: something is wrong; the message says what to do.
    """
    given = _given(
        span=span,
        steps=steps,
        damping=damping,
        anchor=anchor,
        mode=mode,
        kv=kv,
        decode=decode,
        first_n=first_n,
        rule=rule,
        schedule=schedule,
        momentum=momentum,
        history=history,
        frozen_routing=frozen_routing,
        norm_interpolation=norm_interpolation,
        path=path,
        rys=rys,
        from_mergekit=from_mergekit,
    )
    source = LoopSource(given, preset)  # validate before downloading the base
    if weights not in METHODS:
        raise OutputError(f"weights method {weights!r} must be one of {', '.join(METHODS)}")
    headers_only = dry_run or weights == WITHOUT
    base = find_checkpoint(
        str(model), revision, headers_only=headers_only, without_adapter=without_adapter, text_only=text_only
    )
    check_method(base, weights)
    loop = source.on(base, str(model))
    if mlx:
        _check_mlx(base, loop.spec)
    out = output_path(out) if out is not None else _default_out(base, loop.spec)
    check_output(out, base.root, overwrite=overwrite, is_replaceable=is_export)
    check_replaceable(out)
    cost = loop_cost(base, loop.spec)
    warnings = (
        *(*loop.warnings, *base_file_warnings(base)),
        *(mlx_warnings(base.config) if mlx else ()),
        *(replacement_warnings(out, mlx=mlx) if overwrite else ()),
    )
    files = small_files(base, loop.spec, cost, has_weights=weights != WITHOUT, mlx=mlx)
    return ConvertPlan(base, out, loop.spec, cost, weights, overwrite, warnings, files, mlx)


@suggest_keywords
def convert(
    model: str | Path,
    out: str | Path | None = None,
    *,
    span: Span | None = None,
    steps: int | Sequence[int] | None = None,
    damping: float | None = None,
    anchor: float | None = None,
    mode: Mode | None = None,
    kv: KvPolicy | None = None,
    decode: DecodeMode | None = None,
    first_n: int | None = None,
    rule: RuleName | None = None,
    schedule: str | Sequence[float] | None = None,
    momentum: float | None = None,
    history: int | None = None,
    frozen_routing: bool | None = None,
    norm_interpolation: bool | None = None,
    path: LayerPath | None = None,
    rys: RysPair | None = None,
    from_mergekit: str | Path | None = None,
    preset: str | None = None,
    revision: str | None = None,
    weights: Weights = "auto",
    without_adapter: bool = False,
    text_only: bool = False,
    mlx: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda count: None,
) -> Export:
    """Convert a model: `plan_convert(...).apply(progress)`.

    A field of the loop that is None takes the preset's value, or else its default.

    Example:
        >>> convert("Qwen/Qwen3-4B", "qwen3-4b-looped", span=(15, 19), steps=3)  # doctest: +SKIP

    Args:
        model: a local directory or a Hub id.
        out: the directory to write; None names it after the base, the span and K, in the current directory.
        span: the layers to loop, half-open, counted from 0: `(12, 20)` or "12:20"; a list for several spans, each
            with its own K if it is written as "12:20x3"; "auto" for a heuristic.
        steps: K, the number of steps; 1 is the base model. A list gives one for each span.
        damping: the step size s, in (0, 1]; 1 is naive looping.
        anchor: beta, the weight of the natural pass in the output, in [0, 1].
        mode: "block" loops the span as one function, "layer" loops each of its layers in turn.
        kv: which keys and values an iteration attends to: "shared", "per_step" or "reference".
        decode: which decode steps loop: "full" (all), "bypass" (none) or "first_n".
        first_n: the number of decode steps that loop, with `decode="first_n"`.
        rule: the update rule, a key of `RULES`.
        schedule: the numbers for rules ema_sched and poly_blend.
        momentum: for rule heavy_ball, in [0, 1).
        history: for rule anderson, the number of past differences to fit.
        frozen_routing: iterations use the experts that the natural pass chose.
        norm_interpolation: rescale each iterate to a norm between |x| and |n|.
        path: instead of a span, the layers that a token visits: "0-14,12-39" or half-open runs, ((0, 15), (12, 40)).
        rys: instead of a span, RYS's (i, j), which runs layers i to j-1 twice: steps 2, damping 1, kv "per_step".
        from_mergekit: instead of a span, a mergekit config with passthrough slices of one model.
        preset: the name of a published loop. It gives the fields that are not given here.
        revision: branch, tag or commit of a Hub model.
        weights: how to put the weights in place; "auto" is a reflink where the file system can, else a copy; "none"
            leaves the weights of a Hub model on the Hub, and `push` copies them there.
        without_adapter: ignore a PEFT adapter beside the weights, which transformers would load too.
        text_only: take the language model alone out of a multimodal model.
        mlx: let mlx-lm load the export too.
        overwrite: replace an existing export at `out`.
        progress: called with the number of weight bytes just copied.

    Raises:
        LoopExportError: something is wrong; the message says what to do.
    """
    plan = plan_convert(
        model,
        out,
        span=span,
        steps=steps,
        damping=damping,
        anchor=anchor,
        mode=mode,
        kv=kv,
        decode=decode,
        first_n=first_n,
        rule=rule,
        schedule=schedule,
        momentum=momentum,
        history=history,
        frozen_routing=frozen_routing,
        norm_interpolation=norm_interpolation,
        path=path,
        rys=rys,
        from_mergekit=from_mergekit,
        preset=preset,
        revision=revision,
        weights=weights,
        without_adapter=without_adapter,
        text_only=text_only,
        mlx=mlx,
        overwrite=overwrite,
    )
    return plan.apply(progress)


def _check_mlx(base: Checkpoint, loop: LoopSpec) -> None:
    reason = why_not_on_mlx(base, tuple(shard.name for shard in base.shards), loop, "--")
    if reason is not None:
        raise SpecError(f"mlx-lm cannot run this: {reason}; or leave --mlx out")


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _default_out(base: Checkpoint, spec: LoopSpec) -> Path:
    name = base.origin.name.rsplit("/", 1)[-1] + ("-text" if base.edited else "")
    runs = _joined(spec.spans if spec.path is None else spec.path)
    if len(runs) > MAX_RUNS_NAME:
        runs = "-".join(filter(None, (_joined(joined_runs(spec.layers)), bytes_sha256(runs.encode())[:8])))
    steps = "k" + "-".join(map(str, dict.fromkeys(spec.steps_of_spans)))
    kind = steps if spec.path is None else "path-k1" if spec.is_identity else "path"
    return Path(f"{name}-looped-{runs}-{kind}")


def _joined(runs: Iterable[tuple[int, int]]) -> str:
    return "-".join(f"{start}-{stop}" for start, stop in runs)


def _write(path: Path, content: bytes) -> FileRecord:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return FileRecord(len(content), bytes_sha256(content))
