"""Plans and results of `scan` as lines of text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from loopexport.evaluation.grid import LeftOut
from loopexport.evaluation.scan_result import CellResult, ScanResult
from loopexport.evaluation.scan_run import ScanPlan
from loopexport.evaluation.verdict_text import p_text, sentence, signed

from .comparison_text import aligned
from .evaluation_text import subject_line, tasks_line

SHOWN_NAMES = 4  # of the loops that were left out for one reason
_HEADINGS = ("loop", "part", "items", "cost", "difference", "95 % interval", "gained", "lost", "p")


def scan_plan_lines(plan: ScanPlan) -> list[str]:
    """The lines of a plan of `scan`."""
    costs = [cell.cost for cell in plan.cells]
    return [
        subject_line(plan.compare.subject),
        f"Loops    {len(plan.cells)}, {min(costs):.2f}x to {max(costs):.2f}x the base's layer evaluations per token",
        *(f"Left out {line}" for line in _left_out_lines(plan.left_out)),
        tasks_line(plan.compare.tasks, plan.compare.prompting.limit),
        f"Test     the best {plan.finalists} loops, on about {100 * plan.test_share:g} % of the items, which rank none",
        f"Cost     at most {plan.cost:.1f} times the base on all items, less what the loops share",
        *([] if plan.max_hours is None else [f"Budget   {plan.max_hours:g} hours, by an estimate from a few items"]),
        *([] if plan.out is None else [f"Results  {plan.out}"]),
        *(f"Note     {warning}" for warning in plan.warnings),
    ]


def _left_out_lines(left_out: Sequence[LeftOut]) -> list[str]:
    """One line for each reason."""
    names = defaultdict(list)
    for each in left_out:
        names[each.reason].append(each.name)
    return [f"{_listed(each)}: {reason}" for reason, each in names.items()]


def _listed(names: list[str]) -> str:
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def scan_lines(result: ScanResult) -> list[str]:
    """A table of all loops by their difference, the test of the finalists, and the answer."""
    return [
        *aligned([_HEADINGS, *(_row(each, "selection") for each in result.cells)]),
        "",
        *_nan_lines(result.cells),
        *_test_lines(result.finalists),
        *_shared_lines(result),
        *_answer(result),
    ]


def _row(result: CellResult, part: str) -> tuple[str, ...]:
    row = result.test if part == "test" and result.test is not None else result.selection
    return (
        result.cell.name,
        part,
        f"{row.n:,}",
        f"{result.cell.cost:.2f}x",
        signed(row, row.difference),
        f"{signed(row, row.low)} to {signed(row, row.high)}",
        str(row.gained),
        str(row.lost),
        p_text(row) if part == "test" else "",
    )


def _nan_lines(cells: Sequence[CellResult]) -> list[str]:
    rows = [(each.cell.name, [each.selection, *filter(None, [each.test])]) for each in cells]
    broken = [name for name, parts in rows if any(part.loop_nan for part in parts)]
    if any(part.base_nan for _, parts in rows for part in parts):
        names, advice = ["base", *broken], "Try --dtype float32: where the base overflows, no loop can be recommended"
    else:
        names, advice = broken, "Try --dtype float32, or milder loops"
    return [f"NaN in place of answers, counted as wrong: {_listed(names)}. {advice}.", ""] if names else []


def _test_lines(finalists: list[CellResult]) -> list[str]:
    if not finalists:
        return ["No loop was better than the base on the selection part, so none was tested."]
    tasks = [f"  {each.cell.name} on {task.name}: {sentence(task)}" for each in finalists for task in each.test_tasks]
    return [
        *aligned([_HEADINGS, *(_row(each, "test") for each in finalists)]),
        "",
        *(f"{each.cell.name}: {sentence(each.test)}" for each in finalists if each.test is not None),
        *(tasks if len(tasks) > len(finalists) else []),
        "",
    ]


def _shared_lines(result: ScanResult) -> list[str]:
    if result.not_shared:
        return [f"The layers before the spans ran for every loop: sharing them failed a check ({result.not_shared})."]
    saved = f"{100 * result.shared:.0f} % of the layer evaluations"
    return [f"The loops shared the layers before their spans, which saved {saved}."] if result.shared else []


def _answer(result: ScanResult) -> list[str]:
    tested = len(result.finalists)
    if result.recommended is None:
        return [
            "No loop is recommended: none was better than the base in the test."
            if tested
            else "No loop is recommended."
        ]
    return [f"Recommended: {result.recommended}. It was better in the test, with p adjusted (Holm) for {tested} loops."]
