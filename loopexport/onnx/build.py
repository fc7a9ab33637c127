"""Carry out an ONNX export: trace once, unroll for each K, verify, and only then move the files in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopexport.base.checkpoint import CARD
from loopexport.errors import OnnxError, OutputError
from loopexport.export.check import Check
from loopexport.export.directory import Export, open_export
from loopexport.export.manifest import MANIFEST, FileRecord, OnnxRecord
from loopexport.export.onnx_files import GENAI_CONFIG
from loopexport.export.small_files import export_card, is_card_edited
from loopexport.export.stale_graphs import loop_difference
from loopexport.files.digests import bytes_sha256, file_xxh3
from loopexport.files.json_text import json_text
from loopexport.files.placement import place, settle_method
from loopexport.files.staged_directory import staged
from loopexport.files.staged_files import Placing, placing, written
from loopexport.loop.spec import LoopSpec, make_spec
from loopexport.onnx.graph.genai import genai_config, genai_graph
from loopexport.onnx.graph.positions import max_positions

from .plan import OnnxPlan, native_config, plan_onnx

if TYPE_CHECKING:
    import onnx_ir as ir

    from loopexport.onnx.trace.skeleton import Skeleton
    from loopexport.onnx.trace.tracer import Traced

Say = Callable[[str], object]


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


def _apply_in(plan: OnnxPlan, root: Path, verify: bool, say: Say) -> OnnxOutcome:
    export = open_export(root)
    say("tracing the model")
    skeleton, traced = trace_export(export, plan.dtype, plan.attention)
    with placing(root) as files:
        layout: dict = {}
        records: dict[str, OnnxRecord] = {}
        checks: dict[str, list[Check]] = {}
        if plan.data is not None:
            say(f"writing {plan.data}")
            layout, records[plan.data] = _write_data(plan, export, skeleton, traced, files)
        for name, spec in plan.graphs.items():
            say(f"unrolling {name}")
            model = build_graph(plan, export, skeleton, traced, spec, layout)
            _save(model, files.partial(name))
            if verify:
                say(f"verifying {name}")
                checks[name] = _verify(plan, root, spec, files.partial(name))
            records[name] = _graph_record(plan, model, spec, files.partial(name), checks.get(name))
        if any(check.passed is False for each in checks.values() for check in each):
            return OnnxOutcome(root, checks, written=False)
        for name in plan.graphs:
            files.move_in(name)
        records |= _write_genai_config(plan, export, traced, files, say)
        _record_files(root, records, files, say)
        files.keep()
    return OnnxOutcome(root, checks, written=True)


def trace_export(export: Export, dtype: str, attention: str = "portable") -> tuple[Skeleton, Traced]:
    """The skeleton of an export's native model, and its trace.

    Raises:
        OnnxError: the family cannot be traced.
    """
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    from loopexport.onnx.trace.attention import ATTENTION, register
    from loopexport.onnx.trace.skeleton import build_skeleton
    from loopexport.onnx.trace.tracer import trace

    register()
    config = native_config(export)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    can_choose = model_class._can_set_attn_implementation()
    if attention == "gqa" and not can_choose:
        raise OnnxError(f"{model_class.__name__} has an attention of its own; use --attention portable")
    options = {"attn_implementation": ATTENTION[attention] if can_choose else "eager"}
    if model_class._can_set_experts_implementation():
        options["experts_implementation"] = "batched_mm"
    torch_dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    skeleton = build_skeleton(config, export.base.tensors, torch_dtype, **options)
    return skeleton, trace(skeleton)


def build_graph(plan: OnnxPlan, export: Export, skeleton, traced, spec: LoopSpec, layout) -> ir.Model:
    """The graph of one loop, its weights bound.

    Raises:
        OnnxError: no graph can do what the spec asks for, or it would hold weights twice.
    """
    from loopexport.onnx.graph.bind_weights import attach_file, attach_stored, stored_bytes
    from loopexport.onnx.graph.unroll import unroll
    from loopexport.onnx.trace.rope import recomputed_beyond

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
    positions = max_positions(traced.model.graph, skeleton.model.config)
    if positions is not None:
        model.metadata_props["max_positions"] = str(positions)
    model.metadata_props.update({f"loop_{key}": json.dumps(value) for key, value in _loop_fields(spec).items()})
    return model


def _loop_fields(spec: LoopSpec) -> dict[str, Any]:
    return {name.removeprefix("loop_"): value for name, value in spec.to_config_fields().items()}


def _save(model: ir.Model, path: Path) -> None:
    import onnx_ir as ir

    with written(path):
        ir.save(model, path, format="protobuf")


def _write_data(plan: OnnxPlan, export: Export, skeleton, traced, files: Placing):
    """Put the data file in place, unless it is there: its bytes follow from the checkpoint and the dtype alone."""
    from loopexport.cli.progress import byte_progress
    from loopexport.onnx.graph.bind_weights import file_layout, write_file

    assert plan.data is not None
    path = export.root / plan.data
    layout, size = file_layout(traced.model, skeleton.recipes)
    known = export.manifest.onnx.get(plan.data)
    if known is not None and path.is_file() and path.stat().st_size == size and file_xxh3(path) == known.xxh3_128:
        return layout, known
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise OutputError(f"{path.parent} has {free:,} bytes free where {size:,} are needed; free some or use --out")
    dtypes: Any = {value.name: value.dtype for value in traced.model.graph.inputs}
    with written(path), byte_progress(f"writing {plan.data}", size) as advance:
        write_file(files.partial(plan.data), layout, skeleton.recipes, export.base, dtypes, advance)
    files.move_in(plan.data)
    return layout, OnnxRecord(path.stat().st_size, xxh3_128=file_xxh3(path))


def _verify(plan: OnnxPlan, root: Path, spec: LoopSpec, path: Path) -> list[Check]:
    from .check import check_graph, why_not_run

    reason = why_not_run(plan.dtype)
    if reason:
        return [Check("the graph equals torch", None, f"not compared: {reason}")]
    return check_graph(root, path, spec, plan.dtype, plan.attention)


def _graph_record(plan: OnnxPlan, model, spec: LoopSpec, path: Path, checks: list[Check] | None) -> OnnxRecord:
    from loopexport.onnx.graph.bind_weights import stored_bytes

    differences = [check.difference for check in checks or [] if check.difference is not None]
    return OnnxRecord(
        size=path.stat().st_size,
        sha256=bytes_sha256(path.read_bytes()),
        steps=spec.steps,
        dtype=plan.dtype,
        attention=plan.attention,
        spec=_loop_fields(spec),
        data=tuple(sorted({location for location, _ in stored_bytes(model)})),
        difference=max(differences, default=None),
    )


def _write_genai_config(plan: OnnxPlan, export: Export, traced, files: Placing, say: Say) -> dict[str, OnnxRecord]:
    """Write the config for onnxruntime-genai, and its record, unless it names a graph that is as good."""
    name, spec, attention = _genai_graph(plan, export)
    if name not in plan.graphs and genai_graph(export.root) == name:
        return {}
    config = genai_config(export, name, traced.model.graph, spec, attention)
    if config is None:
        return {}
    if spec.steps != export.spec.steps:
        say(
            f"{GENAI_CONFIG} names {name}, K = {spec.steps}: there is no graph of the export's own K, "
            f"{export.spec.steps}, which `loopexport onnx {plan.out or export.root}` makes"
        )
    content = json_text(config).encode()
    files.write(GENAI_CONFIG, content)
    return {GENAI_CONFIG: OnnxRecord(len(content), bytes_sha256(content))}


def _genai_graph(plan: OnnxPlan, export: Export) -> tuple[str, LoopSpec, str]:
    """The graph that onnxruntime-genai is to run, its loop and attention: of the export's own K wherever there is one.

    One of this run comes first, then the one that is named already, then any other.
    """
    graphs = {name: (spec, plan.attention) for name, spec in plan.graphs.items()}
    for name, record in export.manifest.onnx.items():
        if record.spec is not None and name not in graphs and (export.root / name).is_file():
            spec = make_spec(**record.spec)
            if not loop_difference(name, spec, export.spec):
                graphs[name] = spec, record.attention or "portable"
    named = genai_graph(export.root)
    ranks = {
        name: (spec.steps != export.spec.steps, name not in plan.graphs, name != named)
        for name, (spec, _) in graphs.items()
    }
    best = min(graphs, key=ranks.__getitem__)
    return best, *graphs[best]


def _record_files(root: Path, records: dict[str, OnnxRecord], files: Placing, say: Say) -> None:
    """Enter the files into the manifest, without those that are gone, and the graphs into a card nobody has edited."""
    export = open_export(root)
    there = {name: record for name, record in export.manifest.onnx.items() if (root / name).is_file()}
    manifest = replace(export.manifest, onnx={**there, **records})
    card = export_card(replace(export, manifest=manifest)).encode()
    if is_card_edited(export) and (root / CARD).read_bytes() != card:  # equal if the last run was stopped right here
        say(f"{CARD} was edited, and stays as it is: it does not tell of the graphs")
    else:
        record = FileRecord(len(card), bytes_sha256(card))
        manifest = replace(manifest, files={**manifest.files, CARD: record})
        files.write(CARD, card)
    files.write(MANIFEST, manifest.to_json().encode())


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


def _failure(checks: dict[str, list[Check]]) -> str:
    failed = [(name, check) for name, each in checks.items() for check in each if check.passed is False]
    name, check = failed[0]
    return f"{name} differs from torch and was not kept: {check.name}: {check.detail}"
