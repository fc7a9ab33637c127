"""What a quantised graph stands for: torch on the dequantised weights, and a copy of the graph in full precision.

The weights are quantised here once more, from the checkpoint, and not read from the data file, so that damage to the
file shows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from loopexport.onnx.runtime.model import OnnxModel
from loopexport.onnx.trace.recipes import Recipe

from .matrices import MatrixSource
from .nodes import DOMAIN, PRODUCT, SCALE_TYPES

EXACT_LEVEL = 1  # of `accuracy_level`: activations in fp32


@contextmanager
def dequantised(model: Any, path: Path) -> Iterator[None]:
    """While active, a torch model has the weights that a graph's codes stand for.

    Args:
        model: the export in torch, in fp32.
        path: the graph; one without quantised weights changes nothing.
    """
    before = {}
    with torch.no_grad():
        for name, node in _products(path).items():
            parameter = model.get_parameter(name)
            before[name] = parameter.clone()
            parameter.copy_(_dequantised(model, name, node))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, values in before.items():
                model.get_parameter(name).copy_(values)


def has_short_activations(path: Path) -> bool:
    """Whether a graph computes with activations in 8 bits."""
    return any("accuracy_level" in node.attributes for node in _products(path).values())


def in_full_precision(model: OnnxModel) -> OnnxModel:
    """The same graph on the same data file, without the quantised activations that make it fast."""
    import onnxruntime

    graph = ir.load(model.path)
    for node in graph.graph.all_nodes():
        if (node.domain, node.op_type) == (DOMAIN, PRODUCT):
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", EXACT_LEVEL)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    folder = "session.model_external_initializers_file_folder_path"
    options.add_session_config_entry(folder, str(model.path.parent))
    exact = copy.copy(model)
    exact.session = onnxruntime.InferenceSession(
        ir.to_proto(graph).SerializeToString(), options, providers=model.session.get_providers()
    )
    return exact


def _products(path: Path) -> dict[str, ir.Node]:
    """One product for each quantised weight of a graph, by the weight's name."""
    found = {}
    for node in ir.load(path).graph.all_nodes():
        if (node.domain, node.op_type) == (DOMAIN, PRODUCT):
            codes = node.inputs[1]
            assert codes is not None
            found[str(codes.name).removesuffix(".codes")] = node
    return found


def _dequantised(model: Any, name: str, node: ir.Node) -> torch.Tensor:
    from transformers.pytorch_utils import Conv1D

    scales = node.inputs[2]
    assert scales is not None
    is_out_first = not isinstance(model.get_submodule(name.removesuffix(".weight")), Conv1D)
    source = MatrixSource(
        Recipe(name),
        is_out_first,
        node.attributes["bits"].as_int(),
        node.attributes["block_size"].as_int(),
        len(node.inputs) > 3 and node.inputs[3] is not None,
        next(dtype for dtype, kind in SCALE_TYPES.items() if kind == scales.dtype),
    )
    values = torch.from_numpy(source.quantise(model.get_parameter(name).detach()).dequantise())
    return values if is_out_first else values.T
