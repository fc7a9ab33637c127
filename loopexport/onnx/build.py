"""Carry out an ONNX export: trace once, unroll for each K, verify, and only then move the files into place."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopexport._keywords import suggest_keywords
from loopexport.base.checkpoint import CARD
from loopexport.choices import Attention, Compute, OnnxDtype
from loopexport.errors import OnnxError
from loopexport.export.card_refresh import write_card_and_manifest
from loopexport.export.check import Check
from loopexport.export.directory import Export, open_export
from loopexport.export.manifest import MANIFEST, OnnxRecord
from loopexport.export.onnx_files import FILES as ONNX_FILES
from loopexport.export.onnx_files import GENAI_CONFIG
from loopexport.export.quantisation import Cost
from loopexport.export.small_files import read_file
from loopexport.export.stale_graphs import loop_difference
from loopexport.files.digests import Progress, bytes_sha256, file_xxh3
from loopexport.files.json_text import json_text
from loopexport.files.output import check_space
from loopexport.files.placement import place, settle_method
from loopexport.files.staged_directory import staged_directory
from loopexport.files.staged_files import StagedFiles, staged_files
from loopexport.files.staging import explain_os_errors
from loopexport.loop.spec import LoopSpec, make_spec
from loopexport.onnx.graph.genai import genai_config, genai_graph
from loopexport.onnx.graph.positions import max_positions

from .data_files import LAYOUT, holds_the_weights, is_intact
from .plan import OnnxPlan, Say, native_config, plan_onnx
from .weights import open_weights

if TYPE_CHECKING:
    import onnx_ir as ir

    from loopexport.onnx.trace.skeleton import Skeleton
    from loopexport.onnx.trace.tracer import Traced

# Names of all files that an ONNX export writes into an export.
WRITTEN = re.compile("|".join([ONNX_FILES.pattern, re.escape(CARD), re.escape(MANIFEST)]))


@dataclass(frozen=True)
class OnnxOutcome:
    """The result of an ONNX export.

    Attributes:
        root: the directory of the graphs.
        checks: the checks of each graph, by its name; empty without verification.
        written: whether the graphs were kept: False if a check failed.
        costs: what quantising costs in each graph, by its name.
        not_measured: why it was not measured; empty if it was, and for plain weights.
    """

    root: Path
    checks: dict[str, list[Check]]
    written: bool
    costs: dict[str, Cost] = field(default_factory=dict)
    not_measured: str = ""


def write_graphs(plan: OnnxPlan, verify: bool, say: Say, progress: Progress) -> OnnxOutcome:
    """Carry out a plan; see `OnnxPlan.apply`."""
    if plan.out is None:
        return _write_into(plan.export.root, plan, verify, say, progress)
    with staged_directory(plan.out, replace=plan.overwrite) as root:
        say(f"copying {plan.export.root}")
        _copy_export(plan.export, root)
        outcome = _write_into(root, plan, verify, say, progress)
        if not outcome.written:
            raise OnnxError(_failure(outcome.checks))
    return replace(outcome, root=plan.out)


@suggest_keywords
def export_onnx(
    root: str | Path,
    *,
    out: str | Path | None = None,
    steps: Sequence[int] | None = None,
    dtype: OnnxDtype = "as-is",
    attention: Attention = "portable",
    compute: Compute | None = None,
    block_size: int = 32,
    symmetric: bool = False,
    quantise_head: bool = False,
    mixed: bool = False,
    text: str | Path | None = None,
    overwrite: bool = False,
    verify: bool = True,
    say: Say = lambda text: None,
    progress: Progress = lambda count: None,
) -> OnnxOutcome:
    """Export to ONNX: `plan_onnx(...).apply(...)`.

    Args:
        root: the export.
        out: where to write a copy of the export with the graphs; None writes them into the export itself.
        steps: one graph for each K; None for the export's own K.
        dtype: the number format of the weights; "as-is" keeps the stored one and writes no weights.
        attention: "portable", or "gqa": faster, but without padded batches.
        compute: the number format of everything else, with int4 and int8; None for "fp32".
        block_size: with int4 and int8: inputs of one output that share a scale.
        symmetric: with int4 and int8: no zero points.
        quantise_head: with int4 and int8: the head in 8 bits, and with it the embedding that it is tied to.
        mixed: with int4: the layers that lose most in 8 bits.
        text: with int4 and int8: a file with text on which to measure what quantising costs; None for LoopExport's own.
        overwrite: replace an existing export at `out`. Graphs in the export itself are always replaced.
        verify: compare each graph with the export in torch, in fp32, and measure what quantising costs.
        say: called with a line at the start of each step.
        progress: called with the number of weight bytes just written.

    Raises:
        OnnxError: verification failed, or the model cannot be exported.
        LoopExportError: something else is wrong; the message says what to do.
    """
    plan = plan_onnx(
        root,
        out=out,
        steps=steps,
        dtype=dtype,
        attention=attention,
        compute=compute,
        block_size=block_size,
        symmetric=symmetric,
        quantise_head=quantise_head,
        mixed=mixed,
        text=text,
        overwrite=overwrite,
    )
    outcome = plan.apply(verify=verify, say=say, progress=progress)
    if not outcome.written:
        raise OnnxError(_failure(outcome.checks))
    return outcome


def _write_into(root: Path, plan: OnnxPlan, verify: bool, say: Say, progress: Progress) -> OnnxOutcome:
    with staged_files(root, WRITTEN, last=MANIFEST, is_new=plan.out is not None) as files:
        export = open_export(root)
        say("tracing the model")
        skeleton, traced = trace_export(export, plan.dtype, plan.attention)
        if plan.data is not None:
            skeleton, traced = prepare(plan, skeleton, traced)
        layout: dict = {}
        records: dict[str, OnnxRecord] = {}
        checks: dict[str, list[Check]] = {}
        if plan.data is not None:
            say(f"writing {plan.data}")
            layout, records[plan.data] = _write_data(plan, export, skeleton, traced, files, progress)
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
        costs: dict[str, Cost] | str = {}
        if plan.quantisation is not None:
            build = partial(build_graph, plan, export, skeleton, traced, layout=layout)
            costs = _measured(plan, root, build, files, say) if verify else "verification was switched off"
            records |= _with_costs(records, costs)
        for name in plan.graphs:
            files.move_in(name)
        records |= _write_genai_config(plan, export, traced, files, say)
        _record_files(root, records, files, say)
        files.keep()
    known, why = ({}, costs) if isinstance(costs, str) else (costs, "")
    return OnnxOutcome(root, checks, True, known, why)


def _measured(plan: OnnxPlan, root: Path, build, files: StagedFiles, say: Say) -> dict[str, Cost] | str:
    from .measure import measure_costs

    def path_of(name: str, spec: LoopSpec) -> Path:
        path = files.partial(name)
        if path.stat().st_size == 0:  # the base's graph, which is not in the plan, and does not stay
            _save(build(spec), path)
        return path

    return measure_costs(plan, root, path_of, say)


def _with_costs(records: dict[str, OnnxRecord], costs: dict[str, Cost] | str) -> dict[str, OnnxRecord]:
    if isinstance(costs, str):
        return {}
    return {name: replace(records[name], cost=asdict(cost)) for name, cost in costs.items()}


def trace_export(export: Export, dtype: str, attention: str = "portable") -> tuple[Skeleton, Traced]:
    """Build the skeleton of an export's native model, and trace it.

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
        raise OnnxError(f"{model_class.__name__} implements attention itself; use --attention portable")
    options = {"attn_implementation": ATTENTION[attention] if can_choose else "eager"}
    if model_class._can_set_experts_implementation():
        options["experts_implementation"] = "batched_mm"
    torch_dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    skeleton = build_skeleton(config, open_weights(export).tensors, torch_dtype, **options)
    return skeleton, trace(skeleton)


def prepare(plan: OnnxPlan, skeleton: Skeleton, traced: Traced) -> tuple[Skeleton, Traced]:
    """A trace for a data file of ours: quantised, with the other weights as the graph multiplies by them.

    Returns:
        Copies; the recipes of the skeleton now say what is in the data file.
    """
    from loopexport.onnx.graph.direct_weights import use_weights_directly
    from loopexport.onnx.quantise.nodes import quantise_products

    traced = replace(traced, model=traced.model.clone())
    recipes: Any = skeleton.recipes
    if plan.quantisation is not None:
        recipes = quantise_products(traced, skeleton.model, recipes, plan.quantisation)
    recipes = use_weights_directly(traced.model.graph, recipes)
    return replace(skeleton, recipes=recipes), traced


def build_graph(plan: OnnxPlan, export: Export, skeleton, traced, spec: LoopSpec, layout) -> ir.Model:
    """The graph of one loop, with its weights bound.

    Raises:
        OnnxError: a graph cannot express the loop, or would store weights twice.
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
        raise OnnxError("the unrolled graph and the graph of the base read different weights; please report this")
    model = graphs[0]
    model.producer_name = "loopexport"
    model.metadata_props["attention"] = plan.attention
    if plan.quantisation is not None:
        model.metadata_props["quantised"] = json.dumps(plan.quantisation.to_dict())
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

    with explain_os_errors(path):
        ir.save(model, path, format="protobuf")


def _write_data(plan: OnnxPlan, export: Export, skeleton, traced, files: StagedFiles, progress: Progress):
    """Write the data file unless it is there already: its bytes depend on the checkpoint and the dtype alone."""
    from loopexport.onnx.graph.bind_weights import file_layout, write_file

    assert plan.data is not None
    path = export.root / plan.data
    layout, size = file_layout(traced.model, skeleton.recipes)
    known = export.manifest.onnx.get(plan.data)
    if known is not None and holds_the_weights(known, plan) and is_intact(path, size, known):
        return layout, known
    check_space(path, size, remedy="use --out")
    dtypes: Any = {value.name: value.dtype for value in traced.model.graph.inputs}
    with explain_os_errors(path):
        write_file(files.partial(plan.data), layout, skeleton.recipes, open_weights(export), dtypes, progress)
    files.move_in(plan.data)
    digest = file_xxh3(path)
    return layout, OnnxRecord(size, xxh3_128=digest, layout=LAYOUT, quantised=plan.quantised)


def _verify(plan: OnnxPlan, root: Path, spec: LoopSpec, path: Path) -> list[Check]:
    from .check import check_graph, why_not_run

    reason = why_not_run(plan.dtype)
    if reason:
        return [Check("the graph equals torch", None, f"not compared: {reason}")]
    return check_graph(root, path, spec, plan.dtype, plan.attention)


def _graph_record(plan: OnnxPlan, model, spec: LoopSpec, path: Path, checks: list[Check] | None) -> OnnxRecord:
    from loopexport.onnx.graph.bind_weights import stored_bytes

    from .check import largest_difference

    return OnnxRecord(
        size=path.stat().st_size,
        sha256=bytes_sha256(path.read_bytes()),
        steps=spec.steps,
        dtype=plan.dtype,
        attention=plan.attention,
        quantised=plan.quantised,
        spec=_loop_fields(spec),
        data=tuple(sorted({location for location, _ in stored_bytes(model)})),
        difference=largest_difference(checks or []),
    )


def _write_genai_config(plan: OnnxPlan, export: Export, traced, files: StagedFiles, say: Say) -> dict[str, OnnxRecord]:
    """Write the config for onnxruntime-genai, and return its record, unless it already names the best graph."""
    name, spec, attention = _genai_graph(plan, export)
    if name not in plan.graphs and genai_graph(export.root) == name:
        return {}
    config = genai_config(export, name, traced.model.graph, spec, attention)
    if config is None:
        return {}
    if spec.steps != export.spec.steps:
        say(
            f"{GENAI_CONFIG} names {name}, K = {spec.steps}: there is no graph of the export's own K, "
            f"{export.spec.steps}; `loopexport onnx {plan.out or export.root}` writes one"
        )
    content = json_text(config).encode()
    files.write(GENAI_CONFIG, content)
    return {GENAI_CONFIG: OnnxRecord(len(content), bytes_sha256(content))}


def _genai_graph(plan: OnnxPlan, export: Export) -> tuple[str, LoopSpec, str]:
    """The best graph for onnxruntime-genai, with its loop and attention.

    The export's own K comes first, then graphs of this run, then the graph that the config already names.
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


def _record_files(root: Path, records: dict[str, OnnxRecord], files: StagedFiles, say: Say) -> None:
    """Add the new files to the manifest, drop missing ones, and regenerate the card unless someone has edited it."""
    export = open_export(root)
    there = {name: record for name, record in export.manifest.onnx.items() if (root / name).is_file()}
    manifest = replace(export.manifest, onnx={**there, **records})
    if not write_card_and_manifest(replace(export, manifest=manifest), files):
        say(f"{CARD} was edited, so it stays as it is and does not mention the graphs")


def _copy_export(export: Export, target: Path) -> None:
    """Copy an export without its ONNX files. The weights share blocks where the file system can."""
    manifest = replace(export.manifest, onnx={})
    for name in manifest.files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(read_file(export.root / name))
    shards = export.base.shards
    method = settle_method("auto", shards[0].path, target)
    for shard in shards:
        place(shard.path, target / shard.name, method)
    (target / MANIFEST).write_text(replace(manifest, weights_method=method).to_json(), encoding="utf-8")


def _failure(checks: dict[str, list[Check]]) -> str:
    failed = [(name, check) for name, each in checks.items() for check in each if check.passed is False]
    name, check = failed[0]
    return f"{name} differs from torch and was not kept: {check.name}: {check.detail}"
