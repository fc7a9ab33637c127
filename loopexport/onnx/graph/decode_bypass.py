"""Decode bypass: put a loop into a branch that decode steps do not take."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from loopexport.onnx.trace.attention import FUSED, FUSED_DOMAIN
from loopexport.onnx.trace.nodes import int_constant

from .loop_layer import SlotPart, is_fused


def decode_step(graph: ir.Graph) -> ir.Value:
    """Add nodes that tell a decode step, which is one token on a cache that is not empty; a boolean, `(1,)`."""
    inputs = {value.name: value for value in graph.inputs}
    one = int_constant(graph, "loop.one", 1)
    tape = ir.tape.Tape()
    new, total = (tape.op("Shape", [inputs[name]], {"start": 1, "end": 2}) for name in ("input_ids", "attention_mask"))
    result = tape.op("And", [tape.op("Equal", [new, one]), tape.op("Greater", [total, new])])
    _name(tape.nodes, "loop.decoding")
    graph.insert_before(next(iter(graph)), tape.nodes)
    return result


def unless_decoding(
    graph: ir.Graph,
    is_decode_step: ir.Value,
    loop: list[ir.Node],
    natural: ir.Value,
    output: ir.Value | None,
    slots: list[SlotPart],
    prefix: str,
) -> tuple[list[ir.Node], ir.Value]:
    """An `If` with the loop in one branch, and the natural pass in the branch of decode steps.

    In a decode step, the cache slots of iterations get the natural keys and values of the token.

    Args:
        graph: the graph, which gets constants.
        is_decode_step: from `decode_step`.
        loop: the loop's nodes.
        natural: the output of the natural pass, `(batch, seq, hidden)`.
        output: the output of the loop, of the same shape.
        slots: the slots that the loop fills; their `present` becomes an output of the `If`.
        prefix: the start of all names.

    Returns:
        The `If`, alone in a list, and the output that it chooses.
    """
    looped, plain = ir.tape.Tape(), ir.tape.Tape()
    results = [looped.op("Identity", [each]) for each in (output, *(slot.present for slot in slots))]
    kept = [plain.op("Identity", [natural])]
    for keys, values in zip(slots[::2], slots[1::2], strict=True):
        kept += _with_natural_token(graph, plain, keys, values)
    branches = {
        "then_branch": _branch(plain.nodes, kept, f"{prefix}/decode"),
        "else_branch": _branch([*loop, *looped.nodes], results, f"{prefix}/loop"),
    }
    choice = ir.node("If", [is_decode_step], branches, num_outputs=len(results), name=f"{prefix}/If")
    for value, chosen in zip((natural, *(slot.present for slot in slots)), choice.outputs, strict=True):
        chosen.type, chosen.name = value.type, f"{prefix}/{value.name}"
    for slot, chosen in zip(slots, choice.outputs[1:], strict=True):
        slot.present = chosen
    return [choice], choice.outputs[0]


def _with_natural_token(graph: ir.Graph, tape: ir.tape.Tape, *slot: SlotPart) -> list[ir.Value]:
    """A slot's keys and values with the natural ones of the new token after them.

    A fused attention appends them: past and present may be one buffer, into which `Concat` cannot write. Nothing reads
    what it computes, so the few heads of the keys are its queries.
    """
    pasts = [each.past for each in slot]
    join = slot[0].natural_join
    if is_fused(join):
        _, new_keys, new_values, _, _, lengths, total = join.inputs
        heads = join.attributes["kv_num_heads"].as_int()
        attributes = {"num_heads": heads, "kv_num_heads": heads}
        _, *joined = tape.op_multi_out(
            FUSED,
            [new_keys, new_keys, new_values, *pasts, lengths, total],
            attributes,
            num_outputs=3,
            domain=FUSED_DOMAIN,
        )
        return joined
    bounds = [int_constant(graph, f"loop.number_{number}", number) for number in (-1, 2**62, -2)]
    return [tape.op("Concat", [each.past, tape.op("Slice", [each.natural, *bounds])], {"axis": -2}) for each in slot]


def _branch(nodes: Iterable[ir.Node], outputs: list[ir.Value], prefix: str) -> ir.Graph:
    """Nodes as a branch of an `If`; a branch has no inputs and reads values of the graph around it."""
    nodes = list(nodes)
    _name([node for node in nodes if node.name is None], prefix)
    return ir.Graph([], outputs, nodes=nodes, name=prefix)


def _name(nodes: Iterable[ir.Node], prefix: str) -> None:
    for number, node in enumerate(nodes):
        node.name = node.outputs[0].name = f"{prefix}/{node.op_type}_{number + 1}"
        for index, value in enumerate(node.outputs[1:], start=1):
            value.name = f"{node.name}.{index}"
