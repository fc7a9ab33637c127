"""Export to ONNX: plan first, then trace once, unroll for each K, verify, and only then move the files in."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopexport.checkpoint import CARD, CONFIG
from loopexport.contents import export_card, is_card_edited
from loopexport.errors import OnnxError, OutputError, SpecError
from loopexport.export import BASE_FOLDER, Export, is_export, open_export
from loopexport.families import onnx_outcome
from loopexport.integrity import Check
from loopexport.manifest import MANIFEST, FileRecord, OnnxRecord
from loopexport.spec import LoopSpec
from loopexport.staging import check_output, staged
from loopexport.weights import place, settle_method, xxh3_of

from .genai import genai_config
from .limits import check_memory, check_spec
from .names import DTYPES, GENAI_CONFIG, data_name, graph_name

if TYPE_CHECKING:
    import onnx_ir as ir

    from .skeleton import Skeleton
    from .trace import Traced

ATTENTION_LAYOUTS = ("portable", "gqa")
PARTIAL = ".partial"

Say = Callable[[str], object]


@dataclass(frozen=True)
class OnnxPlan:
    """What an ONNX export will do, decided and checked before anything is written.

    Attributes:
        export: the export to make a graph of.
        out: another directory, which becomes a copy of the export with the graph in it; None for the export itself.
        specs: one loop for each graph.
        dtype: "fp32", "fp16" or "bf16": what the graph computes in.
        as_is: whether that is what is stored, so that the shards serve as the graph's data.
        attention: one of `ATTENTION_LAYOUTS`.
        overwrite: whether an export at `out` is to be replaced.
        warnings: what the user should know, one line each.
    """

    export: Export
    out: Path | None
    specs: tuple[LoopSpec, ...]
    dtype: str
    as_is: bool
    attention: str
    overwrite: bool
    warnings: tuple[str, ...]

    @property
    def graphs(self) -> dict[str, LoopSpec]:
        """The loop of each graph, by file name."""
        parts = [*([] if self.as_is else [self.dtype]), *([] if self.attention == "portable" else [self.attention])]
        return {graph_name(spec.steps, self.export.spec.steps, "_".join(parts)): spec for spec in self.specs}

    @property
    def data(self) -> str | None:
        """Name of the data file, or None where the shards serve."""
        return None if self.as_is else data_name(self.dtype)

    @property
    def data_bytes(self) -> int:
        """Bytes of weights to be written, but for padding."""
        itemsize = {"fp32": 4, "fp16": 2, "bf16": 2}[self.dtype]
        return 0 if self.as_is else self.export.base.num_params * itemsize

    def to_dict(self) -> dict:
        """The plan for `--json`."""
        return {
            "directory": str(self.out or self.export.root),
            "graphs": {name: spec.to_config_fields() for name, spec in self.graphs.items()},
            "dtype": self.dtype,
            "as_is": self.as_is,
            "attention": self.attention,
            "data": self.data or [shard.name for shard in self.export.base.shards],
            "data_bytes_written": self.data_bytes,
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class OnnxOutcome:
    """What came of an ONNX export.

    Attributes:
        root: the directory of the graphs.
        checks: of each graph by name, what verification found; empty where it was not wanted.
        written: whether the files were moved in, which they are unless a check failed.
    """

    root: Path
    checks: dict[str, list[Check]]
    written: bool


def plan_onnx(
    root: str | Path,
    *,
    out: str | Path | None = None,
    steps: tuple[int, ...] | None = None,
    dtype: str = "as-is",
    attention: str = "portable",
    overwrite: bool = False,
) -> OnnxPlan:
    """Decide and check an ONNX export; writes nothing.

    Args:
        root: an export.
        out: a directory for a copy of the export with the graphs; None puts them into the export itself.
        steps: one graph for each K; None for the export's own.
        dtype: what the graphs compute in, "as-is" for what is stored: then no weights are written.
        attention: one of `ATTENTION_LAYOUTS`.
        overwrite: replace an export that stands at `out`; graphs in the export itself are always made anew.

    Raises:
        LoopExportError: something is wrong; the message says what, and what to do.
    """
    check_installed()
    export = open_export(root)
    if export.lacking:
        raise OnnxError(
            f"{export.lacking[0]} is not in {export.root}, and a graph is made from the weights: convert with them"
        )
    if "quantization_config" in export.base.config:
        raise OnnxError("the base is quantised; ONNX export takes checkpoints in fp32, fp16 or bf16")
    if attention not in ATTENTION_LAYOUTS:
        raise OnnxError(f"attention {attention!r} must be one of {', '.join(ATTENTION_LAYOUTS)}")
    stored = _stored_dtype(export)
    if dtype != "as-is" and dtype not in DTYPES:
        raise OnnxError(f"dtype {dtype!r} must be one of as-is, {', '.join(DTYPES)}")
    chosen = stored if dtype == "as-is" else dtype
    specs = tuple(_spec_for(export.spec, each) for each in dict.fromkeys(steps or (export.spec.steps,)))
    _check_specs(specs)
    check_memory(_native_config(export))
    target = _checked_out(export, out, overwrite)
    warnings = tuple(_warnings(export, chosen, attention))
    return OnnxPlan(export, target, specs, chosen, chosen == stored, attention, overwrite, warnings)


def apply(plan: OnnxPlan, *, verify: bool = True, say: Say = lambda text: None) -> OnnxOutcome:
    """Carry out a plan. What fails verification is not moved in, and nothing else is touched.

    Args:
        plan: from `plan_onnx`.
        verify: compare each graph with the export in torch, which loads it in fp32.
        say: called with a line about each step as it begins.

    Raises:
        OnnxError: the model cannot be traced.
        OutputError: the files cannot be written.
    """
    if plan.out is None:
        return _apply_in(plan, plan.export.root, verify, say)
    with staged(plan.out, replace=plan.overwrite) as root:
        say(f"copying {plan.export.root}")
        _copy_export(plan.export, root)
        outcome = _apply_in(plan, root, verify, say)
        if not outcome.written:
            raise OnnxError(_failure(outcome.checks))
    return replace(outcome, root=plan.out)


def export_onnx(root: str | Path, *, verify: bool = True, **options) -> OnnxOutcome:
    """Export to ONNX: `plan_onnx` and `apply` in one, with the options of the former.

    Raises:
        OnnxError: verification failed, or the model cannot be exported.
    """
    outcome = apply(plan_onnx(root, **options), verify=verify)
    if not outcome.written:
        raise OnnxError(_failure(outcome.checks))
    return outcome


def check_installed() -> None:
    """Raise OnnxError unless what the export needs is there."""
    missing = [name for name in ("onnx", "onnx_ir", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise OnnxError(f"{missing[0]} is not installed; `pip install loopexport[onnx]` (or [onnx-cuda]) brings it")
    try:
        release = version("transformers")
    except PackageNotFoundError:  # installed without metadata
        return
    if int(release.split(".")[0]) < 5:
        raise OnnxError(f"ONNX export needs transformers 5 or newer, not {release}")


# ---------------------------------------------------------------------------------------------------------------------
# Planning.
# ---------------------------------------------------------------------------------------------------------------------


def _stored_dtype(export: Export) -> str:
    """What most stored numbers are."""
    counts: Counter[str] = Counter()
    for tensor in export.base.tensors.values():
        counts[tensor.dtype] += tensor.num_elements
    names = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
    stored = counts.most_common(1)[0][0]
    if stored not in names:
        raise OnnxError(f"the weights are stored as {stored}; ONNX export takes {', '.join(names)}")
    return names[stored]


def _spec_for(spec: LoopSpec, steps: int) -> LoopSpec:
    try:
        return replace(spec, steps=steps)
    except ValueError as error:
        raise SpecError(str(error)) from None


def _native_config(export: Export) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(export.root / BASE_FOLDER / CONFIG)


def _check_specs(specs: tuple[LoopSpec, ...]) -> None:
    for spec in specs:
        check_spec(spec)


def _checked_out(export: Export, out: str | Path | None, overwrite: bool) -> Path | None:
    if out is None or Path(out).expanduser().resolve() == export.root.resolve():
        if not os.access(export.root, os.W_OK | os.X_OK):
            raise OutputError(f"cannot write into {export.root}; use --out for a copy elsewhere")
        return None
    path = Path(out).expanduser()
    check_output(path, export.root, overwrite=overwrite, is_replaceable=is_export)
    return path


def _warnings(export: Export, dtype: str, attention: str) -> Iterator[str]:
    import onnxruntime

    model_type = export.base.config["model_type"]
    status, reason = onnx_outcome(model_type)
    if status == "refused":
        yield f"a tiny model of family {model_type!r} could not be exported: {reason}"
    if dtype == "bf16" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        yield (
            "ONNX Runtime computes in bf16 on CUDA only, so the graph can be neither verified nor run here; "
            "--dtype fp32 or fp16 makes one that runs on the CPU"
        )
    if attention == "gqa":
        yield "attention gqa takes no padded batch, and several tokens on a cache for one prompt at a time only"
        if dtype == "fp32":
            yield "attention gqa computes in fp16 and bf16 only on CUDA; this graph is for the CPU"


# ---------------------------------------------------------------------------------------------------------------------
# Carrying out.
# ---------------------------------------------------------------------------------------------------------------------


def _apply_in(plan: OnnxPlan, root: Path, verify: bool, say: Say) -> OnnxOutcome:
    export = open_export(root)
    say("tracing the model")
    skeleton, traced = trace_export(export, plan.dtype, plan.attention)
    with _partial_files(root) as partial:
        layout: dict = {}
        records: dict[str, OnnxRecord] = {}
        checks: dict[str, list[Check]] = {}
        if plan.data is not None:
            say(f"writing {plan.data}")
            layout, records[plan.data] = _write_data(plan, export, skeleton, traced, partial(plan.data))
        for name, spec in plan.graphs.items():
            say(f"unrolling {name}")
            model = build_graph(plan, export, skeleton, traced, spec, layout)
            _save(model, partial(name))
            if verify:
                say(f"verifying {name}")
                checks[name] = _verify(plan, root, spec, partial(name))
            records[name] = _graph_record(plan, model, spec, partial(name), checks.get(name))
        if any(check.passed is False for each in checks.values() for check in each):
            if plan.data is not None and plan.data not in export.manifest.onnx:
                (root / plan.data).unlink()
            return OnnxOutcome(root, checks, written=False)
        _write_genai_config(plan, export, traced, partial, records)
        for name in records:
            if name != plan.data:
                partial(name).replace(root / name)
    _record_files(export.root, records, say)
    return OnnxOutcome(root, checks, written=True)


def trace_export(export: Export, dtype: str, attention: str = "portable") -> tuple[Skeleton, Traced]:
    """The skeleton of an export's native model, and its trace.

    Raises:
        OnnxError: the family cannot be traced.
    """
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    from . import trace
    from .skeleton import build_skeleton

    trace.register()
    config = _native_config(export)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    can_choose = model_class._can_set_attn_implementation()
    if attention == "gqa" and not can_choose:
        raise OnnxError(f"{model_class.__name__} has an attention of its own; use --attention portable")
    options = {"attn_implementation": trace.ATTENTION[attention] if can_choose else "eager"}
    if model_class._can_set_experts_implementation():
        options["experts_implementation"] = "batched_mm"
    torch_dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    skeleton = build_skeleton(config, export.base.tensors, torch_dtype, **options)
    return skeleton, trace.trace(skeleton)


def build_graph(plan: OnnxPlan, export: Export, skeleton, traced, spec: LoopSpec, layout) -> ir.Model:
    """The graph of one loop, its weights bound.

    Raises:
        OnnxError: no graph can do what the spec asks for, or it would hold weights twice.
    """
    from .rope import recomputed_beyond
    from .unroll import unroll
    from .weights import attach_file, attach_stored, stored_bytes

    graphs = []
    for each in (spec, replace(spec, steps=1, schedule=None, damping=None)):
        model = unroll(traced, each)
        if plan.data is None:
            attach_stored(model, skeleton.recipes, export.base)
        else:
            attach_file(model, layout, plan.data)
        graphs.append(model)
    if stored_bytes(graphs[0]) != stored_bytes(graphs[1]):
        raise OnnxError(
            "the unrolled graph and that of the base differ in the weights that they read; please report it"
        )
    model = graphs[0]
    model.producer_name = "loopexport"
    model.metadata_props["attention"] = plan.attention
    limit = recomputed_beyond(skeleton.model)
    if limit is not None:
        model.metadata_props["recomputed_beyond"] = str(limit)
    model.metadata_props.update({f"loop_{key}": json.dumps(value) for key, value in _loop_fields(spec).items()})
    return model


def _loop_fields(spec: LoopSpec) -> dict[str, Any]:
    return {name.removeprefix("loop_"): value for name, value in spec.to_config_fields().items()}


def _save(model: ir.Model, path: Path) -> None:
    import onnx_ir as ir

    with _written(path):
        ir.save(model, path, format="protobuf")


def _write_data(plan: OnnxPlan, export: Export, skeleton, traced, partial: Path):
    """Put the data file in place, unless it is there: its bytes follow from the checkpoint and the dtype alone."""
    from loopexport.progress import byte_progress

    from .weights import file_layout, write_file

    assert plan.data is not None
    path = export.root / plan.data
    layout, size = file_layout(traced.model, skeleton.recipes)
    known = export.manifest.onnx.get(plan.data)
    if known is not None and path.is_file() and xxh3_of(path) == known.xxh3_128:
        return layout, known
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise OutputError(f"{path.parent} has {free:,} bytes free where {size:,} are needed; free some or use --out")
    dtypes: Any = {value.name: value.dtype for value in traced.model.graph.inputs}
    with _written(path), byte_progress(f"writing {plan.data}", size) as advance:
        write_file(partial, layout, skeleton.recipes, export.base, dtypes, advance)
        partial.replace(path)
    return layout, OnnxRecord(path.stat().st_size, xxh3_128=xxh3_of(path))


def _verify(plan: OnnxPlan, root: Path, spec: LoopSpec, path: Path) -> list[Check]:
    from .check import check_graph, why_not_run

    reason = why_not_run(plan.dtype)
    if reason:
        return [Check("the graph equals torch", None, f"not compared: {reason}")]
    return check_graph(root, path, spec, plan.dtype, plan.attention)


def _graph_record(plan: OnnxPlan, model, spec: LoopSpec, path: Path, checks: list[Check] | None) -> OnnxRecord:
    from .weights import stored_bytes

    differences = [check.difference for check in checks or [] if check.difference is not None]
    return OnnxRecord(
        size=path.stat().st_size,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        steps=spec.steps,
        dtype=plan.dtype,
        attention=plan.attention,
        spec=_loop_fields(spec),
        data=tuple(sorted({location for location, _ in stored_bytes(model)})),
        difference=max(differences, default=None),
    )


def _write_genai_config(plan: OnnxPlan, export: Export, traced, partial, records: dict[str, OnnxRecord]) -> None:
    own = next((name for name, spec in plan.graphs.items() if spec.steps == export.spec.steps), next(iter(plan.graphs)))
    config = genai_config(export, own, traced.model.graph, plan.graphs[own], plan.attention)
    if config is None:
        return
    content = (json.dumps(config, indent=2) + "\n").encode()
    with _written(partial(GENAI_CONFIG)):
        partial(GENAI_CONFIG).write_bytes(content)
    records[GENAI_CONFIG] = OnnxRecord(len(content), hashlib.sha256(content).hexdigest())


def _record_files(root: Path, records: dict[str, OnnxRecord], say: Say) -> None:
    """Enter the files into the manifest, and the graphs into a card that nobody has edited."""
    export = open_export(root)
    manifest = replace(export.manifest, onnx={**export.manifest.onnx, **records})
    if is_card_edited(export):
        say(f"{CARD} was edited, and stays as it is: it does not tell of the graphs")
    else:
        card = export_card(replace(export, manifest=manifest)).encode()
        record = FileRecord(len(card), hashlib.sha256(card).hexdigest())
        manifest = replace(manifest, files={**manifest.files, CARD: record})
        _replace_file(root / CARD, card)
    _replace_file(root / MANIFEST, manifest.to_json().encode())


def _replace_file(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}{PARTIAL}")
    with _written(path):
        partial.write_bytes(content)
        partial.replace(path)


def _copy_export(export: Export, target: Path) -> None:
    """A copy of an export without its ONNX files; the weights share blocks or bytes where the file system can."""
    manifest = replace(export.manifest, onnx={})
    for name in manifest.files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes((export.root / name).read_bytes())
    shards = export.base.shards
    method = settle_method("auto", shards[0].path, target)
    for shard in shards:
        place(shard.path, target / shard.name, method)
    (target / MANIFEST).write_text(replace(manifest, weights_method=method).to_json(), encoding="utf-8")


@contextmanager
def _partial_files(root: Path) -> Iterator[Callable[[str], Path]]:
    """A function from names to files being written, which are gone when the block ends unless they were moved in."""
    made: list[Path] = []

    def partial(name: str) -> Path:
        made.append(root / f".{name}{PARTIAL}")
        return made[-1]

    try:
        yield partial
    finally:
        for path in made:
            path.unlink(missing_ok=True)


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from None


def _failure(checks: dict[str, list[Check]]) -> str:
    failed = [(name, check) for name, each in checks.items() for check in each if check.passed is False]
    name, check = failed[0]
    return f"{name} differs from torch and was not kept: {check.name}: {check.detail}"
