"""Plans, exports and checks as lines of text for people."""

from __future__ import annotations

from .checkpoint import Checkpoint, Origin
from .conversion import WITHOUT, ConvertPlan
from .cost import Cost, dtype_name
from .describe import describe_decode, describe_layers, describe_refinements, describe_rule, describe_span
from .export import Export
from .integrity import WITHOUT_WEIGHTS, Check
from .publication import COPY, DELETE, THERE, UPLOAD, PushPlan, PushResult
from .spec import RULES, LoopSpec

TRAVEL = {UPLOAD: "uploaded", COPY: "copied on Hub", THERE: "already there", DELETE: "deleted there"}
MARKS = {True: "ok  ", False: "FAIL", None: "n/a "}


def plan_lines(plan: ConvertPlan) -> list[str]:
    """What a conversion will do."""
    files = _files(len(plan.base.shards))
    return [
        *_model_lines(plan.base, plan.spec, plan.cost),
        f"Weights  {files}, {plan.base.weight_bytes:,} bytes; {_weights_text(plan)}",
        f"Output   {plan.out}",
        *([f"Leaves   {', '.join(plan.base.left_behind)}"] if plan.base.left_behind else []),
        *(f"Note     {warning}" for warning in plan.warnings),
    ]


def export_lines(export: Export) -> list[str]:
    """What an export is, where it came from and what it costs."""
    edited = "" if export.spec == export.manifest.spec else "; loop edited since"
    return [
        *_model_lines(export.base, export.spec, export.cost),
        _export_weights_text(export),
        f"Written  by LoopExport {export.manifest.loopexport}{edited}",
    ]


def check_lines(checks: list[Check]) -> list[str]:
    """One line for each check."""
    return [f"{MARKS[check.passed]} {check.name}: {check.detail}" for check in checks]


def push_lines(plan: PushPlan, result: PushResult) -> list[str]:
    """How each file got to the Hub, or would get there, and where it can be seen."""
    width = max(len(transfer.name) for transfer in result.transfers)
    totals = f"{result.bytes_by(UPLOAD):,} bytes uploaded, {result.bytes_by(COPY):,} copied on the Hub"
    return [
        *(f"{TRAVEL[each.how]:14}  {each.name:{width}}  {each.size:>15,}" for each in result.transfers),
        *(f"{'stays here':14}  {name}" for name in plan.staying),
        f"Dry run: nothing was sent. {totals.replace('bytes', 'bytes would be', 1)}"
        if result.commit is None
        else f"Pushed to {result.url} as commit {result.commit}: {totals}",
    ]


def rule_lines() -> list[str]:
    """The update rules as a table, and what the letters mean."""
    width = max(map(len, RULES))
    lines = [
        f"{name:{width}}  {rule.evaluations_per_step} per step  {rule.summary}"
        + (f"  [{', '.join(rule.takes)}]" if rule.takes else "")
        for name, rule in RULES.items()
    ]
    return [*lines, "", "x enters the span, g(h) runs it, h is the iterate, s the damping; [fields it takes]"]


def _model_lines(base: Checkpoint, spec: LoopSpec, cost: Cost) -> list[str]:
    params = sum(tensor.num_elements for tensor in base.tensors.values()) or None
    return [
        f"Base     {_origin(base.origin)}: {base.model_type}, {base.num_layers} layers, "
        f"{_millions(params)} parameters, {dtype_name(base)}",
        f"Span     {describe_span(spec)}, half-open: {describe_layers(spec)} of 0 to {base.num_layers - 1}, "
        f"depth {_depths(base, spec)}",
        f"Loop     {spec.steps} steps, rule {describe_rule(spec)}, anchor {spec.anchor:g}",
        f"         mode {spec.mode}, kv {spec.kv}, decode {describe_decode(spec)}, "
        f"refinements: {describe_refinements(spec)}",
        f"Cost     {cost.layer_evaluations} layer evaluations a token instead of {cost.base_layer_evaluations}: "
        f"{cost.multiplier:.2f}x",
        f"         {_millions(cost.params_read)} parameters read a token instead of {_millions(cost.base_params_read)}",
        f"         {_kv_text(cost)}",
    ]


def _depths(base: Checkpoint, spec: LoopSpec) -> str:
    """The spans as fractions of the depth."""
    return " and ".join(f"{start / base.num_layers:.2f} to {stop / base.num_layers:.2f}" for start, stop in spec.spans)


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def _millions(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e6:,.1f} M"


def _kv_text(cost: Cost) -> str:
    if cost.kv_bytes is None:
        return "K/V cache bytes a token: the config does not tell"
    return f"{cost.kv_bytes:,} K/V cache bytes a token instead of {cost.base_kv_bytes:,}"


def _weights_text(plan: ConvertPlan) -> str:
    if plan.weights == "auto":
        return "reflink where the file system can (no bytes), else a copy"
    if plan.weights == WITHOUT:
        return "not taken along: `loopexport push` lets the Hub copy them from the base"
    return f"{plan.weights}, {plan.max_disk_bytes:,} bytes of disk"


def _export_weights_text(export: Export) -> str:
    files = _files(len(export.manifest.weights))
    if not export.lacking:
        return f"Weights  {files} by {export.manifest.weights_method}"
    size = sum(record.size for record in export.manifest.weights.values())
    why = WITHOUT_WEIGHTS if export.manifest.weights_method == WITHOUT else "they were removed"
    return f"Weights  NOT HERE, {files}, {size:,} bytes: {', '.join(export.lacking)}; {why}"


def _origin(origin: Origin) -> str:
    return origin.name if origin.revision is None else f"{origin.name} at {origin.revision[:12]}"
