"""What a quantised graph stands for: torch on the dequantised weights, and a copy of the graph in full precision.

The weights are quantised here once more, from the checkpoint, and not read from the data file: damage to it shows.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from loopexport.export.quantisation import read_quantisation
from loopexport.onnx.graph.bind_weights import TORCH_DTYPES
from loopexport.onnx.quantise.matrices import MatrixSource
from loopexport.onnx.quantise.nodes import DOMAIN, PRODUCT
from loopexport.onnx.runtime.model import OnnxModel
from loopexport.onnx.runtime.session import quiet_options
from loopexport.onnx.trace.recipes import Recipe

# Places of the codes, which scales follow, and of the zero points, among the inputs of a node.
_ARRAYS = {PRODUCT: ((1, 3),), "QMoE": ((2, 11), (5, 12))}

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
        for name, blocks in _quantised_weights(path).items():
            parameter = model.get_parameter(name)
            before[name] = parameter.clone()
            parameter.copy_(_dequantised(model, name, blocks))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, values in before.items():
                model.get_parameter(name).copy_(values)


def has_short_activations(path: Path) -> bool:
    """Whether a graph computes with activations in 8 bits."""
    return any("accuracy_level" in node.attributes for node in ir.load(path).graph.all_nodes())


def in_full_precision(model: OnnxModel) -> OnnxModel:
    """The same graph on the same data file, without the quantised activations that make it fast."""
    import onnxruntime

    graph = ir.load(model.path)
    for node in graph.graph.all_nodes():
        if (node.domain, node.op_type) == (DOMAIN, PRODUCT):
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", EXACT_LEVEL)
    options = quiet_options()
    folder = "session.model_external_initializers_file_folder_path"
    options.add_session_config_entry(folder, str(model.path.parent))
    exact = copy.copy(model)
    exact.session = onnxruntime.InferenceSession(
        ir.to_proto(graph).SerializeToString(), options, providers=model.session.get_providers()
    )
    return exact


@dataclass(frozen=True)
class _Blocks:
    """How a graph has a weight."""

    bits: int
    block_size: int
    zero_points: bool
    scale_dtype: torch.dtype


def _quantised_weights(path: Path) -> dict[str, _Blocks]:
    """How a graph has each weight that it quantises, by name; none for a base that was quantised already."""
    model = ir.load(path)
    quantisation = read_quantisation(json.loads(model.metadata_props.get("quantised", "null")))
    found: dict[str, _Blocks] = {}
    if quantisation is None or quantisation.kept:
        return found
    for node in model.graph.all_nodes():
        for codes, zeros in _ARRAYS.get(node.op_type, ()) if node.domain == DOMAIN else ():
            weight, scales = node.inputs[codes : codes + 2]
            assert weight is not None
            assert scales is not None
            assert scales.dtype is not None
            bits = node.attributes["bits" if node.op_type == PRODUCT else "expert_weight_bits"].as_int()
            has_zeros = len(node.inputs) > zeros and node.inputs[zeros] is not None
            name = str(weight.name).removesuffix(".codes")
            found[name] = _Blocks(bits, node.attributes["block_size"].as_int(), has_zeros, TORCH_DTYPES[scales.dtype])
    return found


def _dequantised(model: Any, name: str, blocks: _Blocks) -> torch.Tensor:
    from transformers.pytorch_utils import Conv1D

    parameter = model.get_parameter(name).detach()
    is_out_first = not isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D)
    source = MatrixSource(Recipe(name), is_out_first, **vars(blocks))
    values = torch.from_numpy(source.quantise(parameter).dequantise())
    return values.reshape(parameter.shape) if is_out_first else values.T
