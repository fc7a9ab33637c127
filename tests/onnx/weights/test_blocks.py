"""Matrices in blocks: what a code stands for, and what ONNX Runtime makes of the packed arrays."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from loopexport.onnx.weights.blocks import quantise_matrix

SHAPES = {"whole blocks": (5, 64), "an odd number of blocks": (6, 96), "a short last block": (7, 75), "short": (3, 9)}


@pytest.fixture
def weight(request):
    return np.random.default_rng(0).normal(size=SHAPES[request.param]).astype(np.float32)


def product(matrix, rows, accuracy_level=1):
    """ONNX Runtime's `rows @ dequantised.T`."""
    packed = matrix.packed()
    inputs = [ir.Value(name="A", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(rows.shape))]
    arrays = {"B": packed.B, "scales": packed.scales, "zero_points": packed.zero_points}
    constants = [
        ir.Value(name=name, const_value=ir.tensor(array)) for name, array in arrays.items() if array is not None
    ]
    out, columns = matrix.codes.shape
    sizes = {"K": columns, "N": out, "bits": matrix.bits, "block_size": matrix.block_size}
    node = ir.node(
        "MatMulNBits", [*inputs, *constants], {**sizes, "accuracy_level": accuracy_level}, domain="com.microsoft"
    )
    node.outputs[0].name, node.outputs[0].type = "Y", inputs[0].type
    opsets = {"": 23, "com.microsoft": 1}
    graph = ir.Graph(inputs, node.outputs, nodes=[node], initializers=constants, opset_imports=opsets, name="one")
    content = ir.serde.serialize_model(ir.Model(graph, ir_version=10)).SerializeToString()
    (result,) = ort.InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, {"A": rows})
    return result


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("weight", SHAPES, indirect=True)
def test_onnx_runtime_multiplies_by_the_dequantised_matrix(weight, bits, block_size, symmetric):
    matrix = quantise_matrix(weight, bits, block_size, symmetric)
    rows = np.random.default_rng(1).normal(size=(3, weight.shape[1])).astype(np.float32)
    np.testing.assert_allclose(product(matrix, rows), rows @ matrix.dequantise().T, rtol=0, atol=2e-5)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("weight", SHAPES, indirect=True)
def test_each_number_is_near_its_code(weight, bits, symmetric):
    matrix = quantise_matrix(weight, bits, 32, symmetric)
    steps = np.repeat(np.abs(matrix.scales), 32, axis=1)[:, : weight.shape[1]]
    error = np.abs(matrix.dequantise() - weight) / steps
    # A symmetric block has one code less on one side of 0, and with zero points both ends are rounded.
    assert error.max() <= 1 + 1e-4
    assert np.median(error) < 0.3


def test_numbers_of_a_grid_are_kept():
    """What was quantised before gets the same codes again."""
    codes = np.arange(64, dtype=np.uint8).reshape(2, 32) % 16
    first = quantise_matrix((codes.astype(np.float32) - 8) * -0.25, 4, 32, symmetric=True)
    assert (first.codes == codes).all()
    again = quantise_matrix(first.dequantise(), 4, 32, symmetric=True)
    assert (again.dequantise() == first.dequantise()).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_zeros(symmetric):
    weight = np.zeros((3, 40), np.float32)
    weight[1, 35] = 2.0
    assert (quantise_matrix(weight, 4, 32, symmetric).dequantise() == weight).all()
