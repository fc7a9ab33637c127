"""How many positions a graph allows, where the model looks them up in a table instead of computing them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir

# Inputs from which positions are computed.
_POSITION_INPUTS = ("position_ids", "attention_mask", "past_key_values.")
# Operators that only change the shape of their first input.
_RESHAPING = ("Reshape", "Expand", "Unsqueeze", "Squeeze")


def max_positions(graph: ir.Graph, config: Any) -> int | None:
    """The number of positions that the config declares; None if the graph has no table of positions.

    Some tables have extra rows before the first position. A table with fewer rows than positions is of something else,
    such as token types, which are the same for all tokens.

    Args:
        graph: the graph of a native model, as `trace` makes it.
        config: the model's config object of transformers.
    """
    declared = getattr(config, "max_position_embeddings", None)
    if declared is None or not any(size >= declared for node in graph for size in _table_rows(node)):
        return None
    return declared


def _table_rows(node: ir.Node) -> Iterator[int]:
    """The number of rows of the table that a node reads at positions; nothing for other nodes."""
    if node.op_type not in ("Gather", "GatherND") or node.attributes.get_int("axis", 0) != 0:
        return
    table, indices = node.inputs
    if table is None or indices is None or table.shape is None or table.shape.rank() != 2 or _is_int(table):
        return
    if isinstance(table.shape[0], int) and table.producer() is None and _is_position(indices):
        yield table.shape[0]


def _is_position(value: ir.Value) -> bool:
    """Whether integers are computed from positions, through integers only, and not from tokens."""
    waiting, seen, found = [value], set(), False
    while waiting:
        each = waiting.pop()
        producer = each.producer()
        if producer is None and each.name == "input_ids":
            return False
        found = found or (producer is None and str(each.name).startswith(_POSITION_INPUTS))
        if producer is None or id(each) in seen or not (_is_int(each) or each.dtype is None):
            continue
        seen.add(id(each))
        sources = producer.inputs[:1] if producer.op_type in _RESHAPING else producer.inputs
        is_size = producer.op_type == "Shape"  # the shape of `input_ids` says nothing about its tokens
        waiting += [source for source in sources if source is not None and not (is_size and source.name == "input_ids")]
    return found


def _is_int(value: ir.Value) -> bool:
    return value.dtype in (ir.DataType.INT32, ir.DataType.INT64, ir.DataType.BOOL)
