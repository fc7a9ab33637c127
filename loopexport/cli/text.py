"""Plans, exports, results and tables as lines of text."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from loopexport._version import __version__
from loopexport.base.checkpoint import CONFIG, Checkpoint, Origin
from loopexport.base.families import MEDIA, grouped_outcomes, releases
from loopexport.export.adoption import AdoptPlan
from loopexport.export.card_results import difference_text
from loopexport.export.check import Check
from loopexport.export.code_upgrade import UpgradePlan
from loopexport.export.conversion import ConvertPlan
from loopexport.export.directory import Export
from loopexport.export.integrity import WITHOUT_WEIGHTS
from loopexport.export.mlx_plan import MlxPlan
from loopexport.export.results_file import Measured, RecordedResult, TaskResult
from loopexport.export.small_files import export_warnings
from loopexport.export.weights import WITHOUT, made_shards
from loopexport.hub.publication import PushPlan, PushResult
from loopexport.hub.transfers import COPY, DELETE, THERE, UPLOAD
from loopexport.loop.cost import Cost, dtype_name
from loopexport.loop.presets import PRESETS, STATUSES, Preset
from loopexport.loop.spec import RULES, LoopSpec
from loopexport.loop.wording import (
    describe_decode,
    describe_layers,
    describe_loop,
    describe_refinements,
    describe_rule,
    describe_skipped,
    describe_span,
    describe_steps,
    describe_unlooped_steps,
    describe_visits,
)
from loopexport.templates.looped_mlx_limits import MODEL_FILE
from loopexport.templates.looped_spec import Rule

if TYPE_CHECKING:
    from loopexport.checks.code_proof import UpgradeResult
    from loopexport.onnx.build import OnnxOutcome
    from loopexport.onnx.plan import OnnxPlan

TRAVEL = {UPLOAD: "uploaded", COPY: "copied on Hub", THERE: "already there", DELETE: "deleted there"}
MARKS = {True: "ok  ", False: "FAIL", None: "n/a "}


def plan_lines(plan: ConvertPlan) -> list[str]:
    """The lines of a plan of `convert`."""
    files = _files(len(plan.base.shards))
    return [
        *_model_lines(plan.base, plan.spec, plan.cost),
        f"Weights  {files}, {plan.base.weight_bytes:,} bytes; {_weights_text(plan)}",
        *([_text_only(plan)] if plan.text_only else []),
        f"Output   {plan.out}",
        *([f"Leaves   {', '.join(plan.base.left_behind)}"] if plan.base.left_behind else []),
        *(["MLX      mlx-lm will load it, with --trust-remote-code"] if plan.mlx else []),
        *(f"Note     {warning}" for warning in plan.warnings),
    ]


def adopt_plan_lines(plan: AdoptPlan) -> list[str]:
    """The lines of a plan of `adopt`."""
    return [
        *_model_lines(plan.base, plan.spec, plan.cost),
        f"Weights  {_files(len(plan.base.shards))}, {plan.base.weight_bytes:,} bytes; trained, they stay in place",
        f"Writes   {', '.join(plan.written)}, README.md, loopexport.json",
        *([f"Moves    {', '.join(plan.removed)} to base/"] if plan.removed else []),
        *(f"Note     {warning}" for warning in plan.warnings),
    ]


def upgrade_plan_lines(plan: UpgradePlan) -> list[str]:
    """The lines of a plan of `upgrade`."""
    if plan.is_current:
        return [f"{plan.export.root} has today's code already"]
    changes = {"Adds     ": plan.added, "Replaces ": plan.replaced, "Removes  ": plan.removed}
    return [
        f"Export   {plan.export.root}, written by LoopExport {plan.export.manifest.loopexport}",
        *(f"{verb}{', '.join(names)}" for verb, names in changes.items() if names),
    ]


def upgrade_lines(result: UpgradeResult) -> list[str]:
    """The lines of an upgrade's result; none if there was nothing to do."""
    if result.plan.is_current:
        return []
    return [
        f"Compared full forward and cached decoding: largest difference {result.difference:.3g} of the logits' scale",
        *([] if result.is_card_new else ["Note     README.md was edited, so it stays as it is"]),
        f"Upgraded {result.plan.export.root} to the code of LoopExport {__version__}",
    ]


def mlx_plan_lines(plan: MlxPlan) -> list[str]:
    """The lines of a plan of `mlx`."""
    notes = [f"Note     {warning}" for warning in plan.warnings]
    if plan.is_current:
        return [f"mlx-lm loads {plan.export.root} already", *notes]
    return [f"Writes   {CONFIG}: model_file {MODEL_FILE}", *loop_lines(plan.export.spec), *notes]


def mlx_lines(plan: MlxPlan, is_card_new: bool) -> list[str]:
    """The lines after `mlx` has written."""
    if plan.is_current:
        return []
    return [
        *([] if is_card_new else ["Note     README.md was edited, so it stays as it is"]),
        f"mlx-lm loads {plan.export.root} now: mlx_lm.generate --model {plan.export.root} --trust-remote-code",
    ]


def export_lines(export: Export) -> list[str]:
    """The lines of an export: its loop, cost and origin."""
    return [
        *_model_lines(export.base, export.spec, export.cost),
        *_parts_lines(export),
        _export_weights_text(export),
        f"Written  by LoopExport {export.manifest.loopexport}",
        *([f"Edited   since: {_edits(export)}"] if export.edited else []),
        *(
            f"ONNX     {name}: K = {record.steps_text}, {record.dtype}{record.quantised_text}, "
            f"attention {record.attention}"
            for name, record in export.manifest.onnx.items()
            if record.steps is not None
        ),
        *([f"MLX      mlx-lm loads it: model_file {MODEL_FILE}"] if export.runs_on_mlx else []),
        *(f"Note     {warning}" for warning in export_warnings(export)),
    ]


def result_lines(results: Measured) -> list[str]:
    """A line for each task that was measured with an export, and for each that was measured with another loop."""
    if not (results.own or results.other):
        return ["Results  not measured; run `loopexport compare`"]
    lines = [f"Results  {_task_text(result, task)}" for result in results.own for task in result.tasks]
    others = [_task_text(result, task) for result in results.other for task in result.tasks]
    return [*lines, *(f"Results  of another loop or other weights: {text}" for text in others)]


def _task_text(result: RecordedResult, task: TaskResult) -> str:
    scores = f"{task.metric} {task.base:.4f} to {task.loop:.4f}, {difference_text(task)}"
    return f"{task.name}: {scores}, n {task.n:,}, {task.verdict}, {result.date}"


def _edits(export: Export) -> str:
    return ", ".join(f"{name} {was} -> {now}" for name, (was, now) in export.edited.items())


def check_lines(checks: list[Check]) -> list[str]:
    """One line for each check."""
    return [f"{MARKS[check.passed]} {check.name}: {check.detail}" for check in checks]


def push_lines(plan: PushPlan, result: PushResult) -> list[str]:
    """How each file travelled to the Hub, or would travel, and the page to see it."""
    width = max(len(transfer.name) for transfer in result.transfers)
    totals = f"{result.bytes_by(UPLOAD):,} bytes uploaded, {result.bytes_by(COPY):,} copied on the Hub"
    return [
        *(f"{TRAVEL[each.how]:14}  {each.name:{width}}  {each.size:>15,}" for each in result.transfers),
        *(f"{'stays here':14}  {name}" for name in plan.staying),
        f"Dry run: nothing was sent. {totals.replace('bytes', 'bytes would be', 1)}"
        if result.commit is None
        else f"Pushed to {result.url} as commit {result.commit}: {totals}",
    ]


def onnx_plan_lines(plan: OnnxPlan) -> list[str]:
    """The lines of a plan of `onnx`."""
    graphs = ", ".join(f"{name} (K = {describe_steps(spec)})" for name, spec in plan.graphs.items())
    written = (
        f"{plan.data}, about {plan.data_bytes:,} bytes" if plan.data else "the export's own shards, 0 bytes written"
    )
    return [
        f"Graphs   {graphs}",
        f"Loop     {describe_layers(plan.export.spec)}, kv {plan.export.spec.kv}",
        *(f"         K = {describe_steps(spec)}: {_graph_text(spec)}" for spec in plan.specs),
        f"Compute  {plan.dtype}, attention {plan.attention}",
        *([f"Quantise {plan.quantisation.words}"] if plan.quantisation else []),
        f"Weights  {written}",
        f"Output   {plan.out or plan.export.root}",
        *(f"Note     {warning}" for warning in plan.warnings),
    ]


def _graph_text(spec: LoopSpec) -> str:
    """The loop of one graph."""
    if spec.is_identity:
        return "the base"
    if spec.path is not None:
        return f"path {describe_span(spec)}"
    evaluations = " and ".join(str(each) for each in dict.fromkeys(body.evaluations for body in spec.bodies))
    return f"{describe_rule(spec)}, {evaluations} evaluations of the span"


def onnx_outcome_lines(plan: OnnxPlan, outcome: OnnxOutcome) -> list[str]:
    """The lines of an ONNX export's result: each check, and where the graphs are."""
    lines = [f"{name}: {line}" for name, checks in outcome.checks.items() for line in check_lines(checks)]
    lines += [f"{name}: quantising costs, {cost.words(cost.text)}" for name, cost in outcome.costs.items()]
    lines += [f"What quantising costs was not measured: {outcome.not_measured}"] if outcome.not_measured else []
    names = ", ".join(plan.graphs)
    return [*lines, f"Wrote {names} to {outcome.root}" if outcome.written else f"{names} not kept: a check failed"]


def rule_lines() -> list[str]:
    """The update rules as a table, and a legend."""
    width = max(map(len, RULES))
    lines = [
        f"{name:{width}}  {rule.evaluations_per_step} per step  {rule.summary}"
        + (f"  [{', '.join(_field_text(rule, field) for field in rule.takes)}]" if rule.takes else "")
        for name, rule in RULES.items()
    ]
    legend = "x enters the span, g(h) runs it, h is the iterate, s the damping; [fields, with the default of damping]"
    return [*lines, "", legend]


def _field_text(rule: Rule, field: str) -> str:
    """The name of a field; for damping with its default."""
    if field != "damping":
        return field
    return "damping 1/K" if rule.damping is None else f"damping {rule.damping:g}"


def family_lines() -> list[str]:
    """One block for each group of families with the same results: the results, the reason, the names."""
    lines = _group_lines()
    for reads in MEDIA:
        lines += ["", f"Families that read {reads} too:", *_group_lines(reads)]
    return lines


def _group_lines(reads: str = "") -> list[str]:
    lines = []
    for (*statuses, onnx), reason, names in grouped_outcomes(reads):
        by_release = zip(statuses, releases(), strict=True)
        outcome = ", ".join(f"{status or 'absent'} on {release}" for status, release in by_release)
        outcome += f", {onnx} in ONNX" if onnx else ""
        heading = f"{outcome}: {reason}" if reason else outcome
        lines += [heading, *textwrap.wrap(", ".join(names), 110, initial_indent="  ", subsequent_indent="  ")]
    return lines


def preset_list_lines() -> list[str]:
    """All presets, one line each, and the meaning of each status."""
    width = max(len(preset.name) for preset in PRESETS)
    lines = [f"{preset.name:{width}}  {preset.status:14}  {_cell(preset)}: {_gains(preset)}" for preset in PRESETS]
    return [*lines, "", *(f"{status}: {meaning}" for status, meaning in STATUSES.items())]


def preset_lines(preset: Preset) -> list[str]:
    """The lines of one preset."""
    lines = [
        f"Preset   {preset.name}: {preset.status}, {STATUSES[preset.status]}",
        f"Model    {' and '.join(preset.models)}: {preset.model_type}, {preset.num_layers} layers",
    ]
    if preset.spec is None:
        lines.append("Loop     not published")
    else:
        lines += [f"Span     {describe_span(preset.spec)}, half-open", *loop_lines(preset.spec)]
    return [*lines, *(f"Result   {result}" for result in preset.results), *_protocol_lines(preset)]


def _protocol_lines(preset: Preset) -> list[str]:
    """How a preset was measured, and the command that measures it again."""
    lines = [f"Asked    {preset.protocol.text}"]
    if preset.evaluation is None:
        return lines
    command = f"loopexport compare MODEL --preset {preset.name} --out DIR"
    return [*lines, f"Tasks    {', '.join(preset.evaluation.tasks)}", f"Measure  {command}"]


def _cell(preset: Preset) -> str:
    model, spec = f"{preset.models[0]}, {preset.num_layers} layers", preset.spec
    return model if spec is None else f"{model}, {describe_loop(spec)}"


def _gains(preset: Preset) -> str:
    gains = [f"{result.gain:+.2f}" for result in preset.results if result.gain is not None]
    return " and ".join(gains) + " points" if gains else "no number published"


def loop_lines(spec: LoopSpec) -> list[str]:
    """How the layers loop."""
    if spec.path is not None:
        return [f"Loop     {describe_visits(spec)}, kv {spec.kv}, decode {describe_decode(spec)}"]
    return [
        f"Loop     {describe_steps(spec)} steps, rule {describe_rule(spec)}, anchor {spec.anchor:g}",
        f"         mode {spec.mode}, kv {spec.kv}, decode {describe_decode(spec)}, "
        f"refinements: {describe_refinements(spec)}",
    ]


def _model_lines(base: Checkpoint, spec: LoopSpec, cost: Cost) -> list[str]:
    return [
        f"Base     {_origin(base.origin)}: {base.model_type}, {base.num_layers} layers, {_size(base)}",
        where_line(base, spec),
        *loop_lines(spec),
        f"Cost     {cost.layer_evaluations} layer evaluations a token instead of {cost.base_layer_evaluations}: "
        f"{cost.multiplier:.2f}x{describe_unlooped_steps(spec)}",
        f"         {_weights_read_text(cost)}",
        f"         {_kv_text(cost)}",
    ]


def where_line(base: Checkpoint, spec: LoopSpec) -> str:
    """Which layers loop."""
    last = base.num_layers - 1
    if spec.path is not None:
        if spec.is_identity:
            return f"Path     {describe_span(spec)}, half-open: switched off, layers 0 to {last} run once"
        again = f"{describe_layers(spec)} of 0 to {last} more than once{describe_skipped(spec, base.num_layers)}"
        return f"Path     {describe_span(spec)}, half-open: {again}"
    where = f"{describe_layers(spec)} of 0 to {last}, depth {_depths(base, spec)}"
    return f"Span     {describe_span(spec)}, half-open: {where}"


def _depths(base: Checkpoint, spec: LoopSpec) -> str:
    """The spans as fractions of the depth."""
    return " and ".join(f"{start / base.num_layers:.2f} to {stop / base.num_layers:.2f}" for start, stop in spec.spans)


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def _millions(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e6:,.1f} M"


def _size(base: Checkpoint) -> str:
    if base.quantisation:
        return f"quantised by {base.quantisation}, {base.weight_bytes:,} bytes"
    return f"{_millions(base.num_params or None)} parameters, {dtype_name(base)}"


def _weights_read_text(cost: Cost) -> str:
    if cost.bytes_read is None or cost.base_bytes_read is None:
        return "bytes of weights read a token: unknown"
    text = f"{cost.bytes_read:,} bytes of weights read a token instead of {cost.base_bytes_read:,}"
    if cost.params_read is None or cost.base_params_read is None:
        return text
    return f"{text} ({_millions(cost.params_read)} parameters instead of {_millions(cost.base_params_read)})"


def _kv_text(cost: Cost) -> str:
    if cost.kv_bytes is None:
        return "K/V cache bytes a token: the config does not tell"
    return f"{cost.kv_bytes:,} K/V cache bytes a token instead of {cost.base_kv_bytes:,}"


def _weights_text(plan: ConvertPlan) -> str:
    if plan.weights == "auto" and len(made_shards(plan.base)) < len(plan.base.shards):
        return "reflink where the file system can (no bytes), else a copy"
    if plan.weights == WITHOUT:
        return "none: `loopexport push` lets the Hub copy them from the base"
    method = "copy" if plan.weights == "auto" else plan.weights
    return f"{method}, {plan.max_disk_bytes:,} bytes of disk"


def _text_only(plan: ConvertPlan) -> str:
    count, made = len(plan.base.shards), len(made_shards(plan.base))
    files = "weights file" if count == 1 else "weights files"
    return (
        f"Text     the language model alone: {count - made} of {count} {files} unchanged, "
        f"{made} rewritten without the other parts"
    )


def _parts_lines(export: Export) -> list[str]:
    """A line on which parts of a multimodal base are there and loop; none for other bases."""
    if export.base.is_multimodal:
        return ["Parts    multimodal: the loop is in the language model, the other parts run once"]
    name = export.manifest.base.name
    return [f"Parts    the language model alone of the multimodal {name}"] if export.manifest.text_only else []


def _export_weights_text(export: Export) -> str:
    files = _files(len(export.manifest.weights))
    if not export.lacking and export.manifest.trained:
        return f"Weights  {files}, trained: they are not the base's"
    if not export.lacking:
        return f"Weights  {files} by {export.manifest.weights_method}"
    size = sum(record.size for record in export.manifest.weights.values())
    why = WITHOUT_WEIGHTS if export.manifest.weights_method == WITHOUT else "they were removed"
    return f"Weights  NOT HERE, {files}, {size:,} bytes: {', '.join(export.lacking)}; {why}"


def _origin(origin: Origin) -> str:
    return origin.name if origin.revision is None else f"{origin.name} at {origin.revision[:12]}"
