"""Carry out an ONNX export: trace once, unroll for each K, verify, and only then move the files into place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from loopexport._keywords import suggest_keywords
from loopexport.base.checkpoint import CARD
from loopexport.choices import Attention, Compute, OnnxDtype
from loopexport.errors import OnnxError
from loopexport.export.card_refresh import write_card_and_manifest
from loopexport.export.check import Check
from loopexport.export.directory import Export, open_export
from loopexport.export.manifest import MANIFEST, OnnxRecord
from loopexport.export.onnx_files import FILES as ONNX_FILES
from loopexport.export.quantisation import Cost, Divergence
from loopexport.export.small_files import read_file
from loopexport.files.digests import Progress, bytes_sha256, file_xxh3
from loopexport.files.output import check_space
from loopexport.files.placement import place, settle_method
from loopexport.files.staged_directory import staged_directory
from loopexport.files.staged_files import StagedFiles, staged_files
from loopexport.files.staging import explain_os_errors
from loopexport.loop.spec import LoopSpec
from loopexport.templates.looped_spec import as_json

from .assemble import build_graph, loop_fields, prepare, save_graph, trace_export
from .data_files import LAYOUT, holds_the_weights, is_intact
from .genai_files import write_genai_config
from .plan import OnnxPlan, Say, plan_onnx
from .weights.source import Weights, open_weights

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
        attention: "portable", or "gqa": faster and smaller, but only `OnnxModel` gives it padded batches.
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
        weights = open_weights(export)
        say("tracing the model")
        kind = (plan.dtype, plan.attention, *(["whole"] if plan.whole_experts else []))
        skeleton, traced = trace_export(export, *kind)
        if plan.data is not None:
            skeleton, traced = prepare(plan, weights, skeleton, traced)
        layout: dict = {}
        records: dict[str, OnnxRecord] = {}
        checks: dict[str, list[Check]] = {}
        if plan.data is not None:
            say(f"writing {plan.data}")
            layout, records[plan.data] = _write_data(plan, export, weights, skeleton, traced, files, progress)
        for name, spec in plan.graphs.items():
            say(f"unrolling {name}")
            model = build_graph(plan, export, skeleton, traced, spec, layout)
            save_graph(model, files.partial(name))
            if verify:
                say(f"verifying {name}")
                checks[name] = _verify(plan, root, spec, files.partial(name))
            records[name] = _graph_record(plan, model, spec, files.partial(name), checks.get(name))
        if any(check.passed is False for each in checks.values() for check in each):
            return OnnxOutcome(root, checks, written=False)
        costs: dict[str, Cost] | str = {}
        if plan.quantisation is not None:
            build = partial(build_graph, plan, export, skeleton, traced, layout=layout)
            costs = _measure(plan, root, build, files, say) if verify else "verification was switched off"
            records |= _with_costs(records, costs)
        for name in plan.graphs:
            files.move_in(name)
        records |= write_genai_config(plan, export, traced, files, say)
        _record_files(root, records, files, say)
        files.keep()
    known, why = ({}, costs) if isinstance(costs, str) else (costs, "")
    return OnnxOutcome(root, checks, True, known, why)


def _measure(plan: OnnxPlan, root: Path, build, files: StagedFiles, say: Say) -> dict[str, Cost] | str:
    """What quantising costs in each graph; why it was not measured, where it cannot be."""
    from .check.comparison import load_torch, why_not_run
    from .check.cost import divergence, read_text
    from .runtime.model import OnnxModel

    reason = why_not_run(plan.dtype)
    if reason:
        return reason
    if plan.quantisation is not None and plan.quantisation.kept:
        return "the base is quantised already, so there is nothing to compare it with"
    base = replace(plan.specs[0], steps=1, schedule=None, damping=None)
    base_name = plan.graph_name(1)
    if base_name not in plan.graphs:
        save_graph(build(base), files.partial(base_name))

    def open_graph(name: str) -> OnnxModel:
        return OnnxModel(root, files.partial(name).name)

    text = read_text(open_graph(base_name), plan.text)
    if isinstance(text, str):
        return text
    plain = load_torch(root, 1)
    found: dict[str, Divergence] = {}
    for name, spec in {base_name: base, **plan.graphs}.items():
        say(f"measuring what quantising costs: {name}, {text.tokens.size:,} tokens")
        found[name] = divergence(open_graph(name), plain, spec, text)
    return {name: Cost(text.name, int(text.tokens.size), found[base_name], found[name]) for name in plan.graphs}


def _with_costs(records: dict[str, OnnxRecord], costs: dict[str, Cost] | str) -> dict[str, OnnxRecord]:
    if isinstance(costs, str):
        return {}
    return {name: replace(records[name], cost=asdict(cost)) for name, cost in costs.items()}


def _write_data(
    plan: OnnxPlan, export: Export, weights: Weights, skeleton, traced, files: StagedFiles, progress: Progress
):
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
        write_file(files.partial(plan.data), layout, skeleton.recipes, weights, dtypes, progress)
    files.move_in(plan.data)
    digest = file_xxh3(path)
    return layout, OnnxRecord(size, xxh3_128=digest, layout=LAYOUT, quantised=plan.quantised)


def _verify(plan: OnnxPlan, root: Path, spec: LoopSpec, path: Path) -> list[Check]:
    from .check.comparison import check_graph, why_not_run

    reason = why_not_run(plan.dtype)
    if reason:
        return [Check("the graph equals torch", None, f"not compared: {reason}")]
    return check_graph(root, path, spec, plan.dtype, plan.attention)


def _graph_record(plan: OnnxPlan, model, spec: LoopSpec, path: Path, checks: list[Check] | None) -> OnnxRecord:
    from loopexport.onnx.graph.bind_weights import stored_bytes

    from .check.comparison import worst_check

    return OnnxRecord(
        size=path.stat().st_size,
        sha256=bytes_sha256(path.read_bytes()),
        steps=as_json(spec.steps),
        dtype=plan.dtype,
        attention=plan.attention,
        quantised=plan.quantised,
        spec=loop_fields(spec),
        data=tuple(sorted({location for location, _ in stored_bytes(model)})),
        difference=worst_check(checks).difference if checks else None,
    )


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
