"""The data files that graphs of one kind share: what is in one, and which graphs read it.

The bytes depend on the checkpoint, the dtype, the quantisation and our layout, and only the dtype is in the name. The
manifest records the rest, so that no graph reads a file of another kind.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loopexport.errors import OnnxError
from loopexport.export.directory import Export
from loopexport.export.manifest import OnnxRecord
from loopexport.export.onnx_files import data_of, options_for, steps_in_name
from loopexport.files.digests import file_xxh3

if TYPE_CHECKING:
    from .plan import OnnxPlan

LAYOUT = 2  # weights as the graph multiplies by them; files without a number hold them as the checkpoint does


def holds_the_weights(record: OnnxRecord | None, plan: OnnxPlan) -> bool:
    """Whether a recorded data file is of the kind that a plan writes."""
    return record is not None and (record.layout, record.quantised) == (LAYOUT, plan.quantised)


def is_intact(path: Path, size: int, record: OnnxRecord) -> bool:
    """Whether a data file of a size is as its record says."""
    return path.is_file() and path.stat().st_size == size and file_xxh3(path) == record.xxh3_128


def check_other_graphs(plan: OnnxPlan) -> None:
    """Check that no graph outside the plan would read the wrong weights afterwards.

    Raises:
        OnnxError: a graph reads the data file that the plan writes in another way; the message says what to do.
    """
    export = plan.export
    if plan.data is None or plan.out is not None or holds_the_weights(export.manifest.onnx.get(plan.data), plan):
        return
    others = sorted(set(_readers(export, plan.data)) - set(plan.graphs))
    if not others:
        return
    steps = [steps_in_name(name) or export.spec.steps for name in others]
    numbers = {each for each in (*steps, *(spec.steps for spec in plan.specs)) if isinstance(each, int)}
    if [plan.graph_name(each) for each in steps] == others and numbers.issuperset(steps):
        wanted = sorted(numbers)
        remedy = f"write it again too: --steps {','.join(map(str, wanted))}"
    else:
        record = export.manifest.onnx.get(others[0])
        again = options_for(others[0], None if record is None else record.quantisation)
        remedy = f"delete it, and write it again afterwards with `loopexport onnx {export.root}{again}`"
    raise OnnxError(f"{', '.join(others)} in {export.root} reads {plan.data}, which would change; {remedy}")


def _readers(export: Export, data: str) -> list[str]:
    return [path.name for path in export.root.glob("model*.onnx") if data_of(path.name) == data]
