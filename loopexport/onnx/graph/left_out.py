"""Take layers out of a graph that a path leaves out, with their cache slots."""

from __future__ import annotations

import re
from collections.abc import MutableSequence, Sequence

import onnx_ir as ir

from loopexport.onnx.trace.marks import marked_layers

from .loop_layer import is_plain_input

SLOT = re.compile(r"(past_key_values|present)\.(\d+)\.(key|value)")


def leave_out(graph: ir.Graph, skipped: Sequence[int]) -> None:
    """Let each of these layers return what it gets; later cache slots move up. Nothing uses their nodes any more."""
    marked = marked_layers(graph) if skipped else {}
    for index in skipped:
        for use in list(marked[index].output_mark.outputs[0].uses()):
            use.node.replace_input_with(use.idx, marked[index].entry)
    _drop_slots(graph.outputs, skipped)
    _drop_slots(graph.inputs, skipped)


def drop_unread_weights(graph: ir.Graph) -> None:
    """Remove the weights of layers that were left out, once their nodes are gone; a trace has weights as inputs."""
    for value in list(graph.inputs):
        if not (value.uses() or is_plain_input(value)):
            graph.inputs.remove(value)


def _drop_slots(values: MutableSequence[ir.Value], skipped: Sequence[int]) -> None:
    """Remove the slots of these layers from the inputs or outputs of a graph, and number the others anew."""
    for value in list(values):
        match = SLOT.fullmatch(str(value.name))
        if match is None:
            continue
        name, number, part = match[1], int(match[2]), match[3]
        if number in skipped:
            values.remove(value)
        else:
            value.name = f"{name}.{number - sum(1 for each in skipped if each < number)}.{part}"
