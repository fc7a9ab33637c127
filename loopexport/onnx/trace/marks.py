"""Nodes that mark places in a trace, which copying and unrolling find again; none is left in a finished graph."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

MARKS = "loopexport"  # their domain

LAYER_INPUT, LAYER_OUTPUT = "LayerInput", "LayerOutput"  # hidden states around a layer: `layer`
READ = "Read"  # what attention reads, past and new: `slot`, and `value` 0 for keys, 1 for values
ROUTE = "Route"  # what a router answers: `layer`


def mark(kind: str, tensor: torch.Tensor, **attributes: int) -> torch.Tensor:
    """The same tensor, behind a node `loopexport::kind` in the graph."""
    attrs: dict[str, Any] = {**attributes}
    return torch.onnx.ops.symbolic(
        f"{MARKS}::{kind}", (tensor,), attrs, dtype=tensor.dtype, shape=tensor.shape, version=1
    )


def is_mark(node: ir.Node, kind: str | None = None) -> bool:
    """Whether a node is a mark, of a kind where one is given."""
    return node.domain == MARKS and kind in (None, node.op_type)
