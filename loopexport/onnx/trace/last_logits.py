"""The graph's input `num_logits_to_keep`: compute the logits of the last positions alone.

Only the last row of a prompt's logits is needed to generate, and all rows are most of the memory that a long prompt
takes. transformers.js has the same input.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir

from .marks import HEAD_INPUT, is_mark, mark
from .nodes import int_constant

NUM_LOGITS = "num_logits_to_keep"


@contextmanager
def marked_head(model: Any) -> Iterator[None]:
    """Mark the hidden states that enter a native model's output head."""
    handle = model.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: (mark(HEAD_INPUT, args[0]), *args[1:])
    )
    try:
        yield
    finally:
        handle.remove()


def add_num_logits(graph: ir.Graph) -> None:
    """Add the input, an int64 scalar, and make the head run on that many positions only, in place.

    Its default, 0, keeps all: a runtime that does not know the input need not feed it. Call this after the optimiser,
    which would fold the default.
    """
    (head,) = (node for node in graph if is_mark(node, HEAD_INPUT))
    number = ir.Value(name=NUM_LOGITS, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
    number.const_value = ir.tensor(0, dtype=ir.DataType.INT64, name=NUM_LOGITS)
    graph.inputs.append(number)
    graph.register_initializer(number)
    zero, one, end = (int_constant(graph, f"loop.number_{each}", each) for each in (0, 1, 2**62))
    tape = ir.tape.Tape()
    start = tape.op("Sub", [zero, number])  # -0 is the first position, -1 the last
    hidden = tape.op("Slice", [head.inputs[0], start, end, one])
    for node, value, name in zip(tape.nodes, (start, hidden), ("first", "rows"), strict=True):
        node.name = value.name = f"{NUM_LOGITS}/{name}"
    graph.insert_before(head, tape.nodes)
    ir.convenience.replace_all_uses_with(head.outputs[0], hidden)
    graph.remove(head, safe=True)
