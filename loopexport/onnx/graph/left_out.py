"""Take layers out of a graph that a path leaves out, with their cache slots."""

from __future__ import annotations

import re
from collections.abc import MutableSequence, Sequence

import onnx_ir as ir

from loopexport.errors import OnnxError
from loopexport.onnx.trace.marks import marked_layers

from .loop_layer import is_plain_input

SLOT = re.compile(r"(past_key_values|present)\.(\d+)\.(key|value)")


def leave_out(graph: ir.Graph, skipped: Sequence[int]) -> None:
    """Let each of these layers return what it gets, and store nothing; nothing uses their nodes any more.

    Raises:
        OnnxError: the graph knows how many tokens there are from a slot like no other.
    """
    marked = marked_layers(graph) if skipped else {}
    for index in skipped:
        for use in list(marked[index].output_mark.outputs[0].uses()):
            use.node.replace_input_with(use.idx, marked[index].entry)
    _drop_slots(graph.outputs, skipped)
    for value in graph.inputs:
        if _layer_of(value) in skipped:
            _measure_another_slot(graph, value, skipped)


def drop_unread_inputs(graph: ir.Graph, skipped: Sequence[int]) -> None:
    """Remove the cache slots and the weights of layers that were left out, once their nodes are gone.

    In a trace, weights are inputs.
    """
    _drop_slots(graph.inputs, skipped)
    for value in list(graph.inputs):
        if not (value.uses() or is_plain_input(value)):
            graph.inputs.remove(value)


def _layer_of(value: ir.Value) -> int | None:
    """The number of the cache slot that an input or output is a part of; None for another one."""
    match = SLOT.fullmatch(str(value.name))
    return None if match is None else int(match[2])


def _measure_another_slot(graph: ir.Graph, value: ir.Value, skipped: Sequence[int]) -> None:
    """Let the nodes that read the size of a slot, such as the number of past tokens, read that of a remaining slot."""
    for use in list(value.uses()):
        if use.node.op_type != "Shape":
            continue
        read = slice(*(use.node.attributes[name].as_int() for name in ("start", "end") if name in use.node.attributes))
        remaining = [each for each in graph.inputs if _layer_of(each) not in (None, *skipped)]
        alike = [each for each in remaining if _sizes(each)[read] == _sizes(value)[read]]
        if not alike:
            raise OnnxError(
                f"the graph reads sizes of the cache of layer {_layer_of(value)}, which the path leaves out, and no "
                "other layer has such a cache; leave out another layer"
            )
        use.node.replace_input_with(use.idx, alike[0])


def _sizes(value: ir.Value) -> list:
    return [] if value.shape is None else [str(size) for size in value.shape]


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
