"""Plans of `compare` and `scan` as lines of text."""

from __future__ import annotations

from loopexport.evaluation.arms import BASE
from loopexport.evaluation.comparison import LOOP, ComparePlan
from loopexport.evaluation.subject import Subject
from loopexport.evaluation.tasks import TaskSource
from loopexport.loop.spec import LoopSpec
from loopexport.loop.wording import (
    describe_layers,
    describe_loop,
    describe_rule,
    describe_span,
    describe_steps,
    describe_visits,
)


def compare_plan_lines(plan: ComparePlan) -> list[str]:
    """The lines of a plan of `compare`."""
    spec = plan.subject.spec
    where = f"{plan.backend}, {plan.settings['device']}, dtype {plan.engine['dtype']}, batches of {plan.batch_size}"
    return [
        subject_line(plan.subject),
        _loop_line(spec),
        f"Cost     {plan.cost.multiplier:.2f}x the base's layer evaluations per token",
        tasks_line(plan.tasks, plan.prompting.limit),
        f"Compute  {where}",
        *([] if plan.out is None else [f"Results  {plan.out}"]),
        *(f"Note     {warning}" for warning in plan.warnings),
    ]


def _loop_line(spec: LoopSpec) -> str:
    """The loop on one line."""
    if spec.path is not None:
        return f"Loop     {describe_loop(spec)} ({describe_visits(spec)}), kv {spec.kv}"
    return (
        f"Loop     span {describe_span(spec)} ({describe_layers(spec)}), K = {describe_steps(spec)}, mode {spec.mode}, "
        f"kv {spec.kv}, anchor {spec.anchor:g}, rule {describe_rule(spec)}"
    )


def subject_line(subject: Subject) -> str:
    """The model, and whether it is an export."""
    return f"Model    {subject.name}{', an export' if subject.export is not None else ''}"


def tasks_line(tasks: TaskSource, limit: int | None) -> str:
    """The tasks by name, and how many items of each."""
    names = ", ".join([*tasks.names, *([] if tasks.items is None else [tasks.items.name])])
    return f"Tasks    {names}; {'all items' if limit is None else f'the first {limit} items of each'}"


def time_line(seconds: dict[str, float]) -> str:
    """How long base and loop took."""
    return f"The base took {seconds[BASE]:.1f} s and the loop {seconds[LOOP]:.1f} s, without loading."
