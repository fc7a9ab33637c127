"""Other people's tools take our graphs: they quantise every matrix, keep one copy of the weights, and it runs."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16

import loopexport.onnx
from loopexport.onnx import OnnxModel
from support.made_onnx import VOCAB

IDS = np.random.default_rng(2).integers(3, VOCAB, (1, 14))
# Smallest correlation with the original logits, by bits; int8 also rounds the hidden states.
SMALLEST = {16: 0.9999, 8: 0.99, 4: 0.8}


def fold(source, target):
    """Fold as the documentation says."""
    quant_pre_process(
        source, target, skip_symbolic_shape=True, save_as_external_data=True, all_tensors_to_one_file=True,
        external_data_location="model.onnx_data",
    )  # fmt: skip


def logits(path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    length = IDS.shape[1]
    feeds = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "position_ids": np.arange(length)[None]}
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    for each in session.get_inputs():
        if each.name.startswith("past_key_values."):
            feeds[each.name] = np.zeros((1, each.shape[1], 0, each.shape[3]), types[each.type])
    return session.run(["logits"], feeds)[0].astype(np.float32)


def operators(path):
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


def with_blocks(bits):
    def quantise(source, target):
        quantiser = MatMulNBitsQuantizer(onnx.load(source), bits=bits, block_size=16)
        quantiser.process()
        quantiser.model.save_model_to_file(str(target), True)

    return quantise


def dynamic(source, target):
    quantize_dynamic(source, target, op_types_to_quantize=["MatMul"])


@pytest.fixture(scope="module")
def graphs(made, one_trace, tmp_path_factory):
    """Paths: graphs over the shards as they are and folded, and one over a data file."""
    root = tmp_path_factory.mktemp("tools")
    paths = {"shards": made / "model.onnx"}
    for steps, name in ((3, "model.onnx"), (2, "model_k2.onnx")):
        paths[f"folded, K = {steps}"] = root / f"k{steps}" / "model.onnx"
        paths[f"folded, K = {steps}"].parent.mkdir()
        fold(made / name, paths[f"folded, K = {steps}"])
    loopexport.onnx.export_onnx(made, out=root / "fp16", dtype="fp16", verify=False)
    paths["data file"] = root / "fp16" / "model_fp16.onnx"
    return paths


@pytest.mark.parametrize(
    ("kind", "bits", "quantise", "operator"),
    [
        ("folded, K = 3", 4, with_blocks(4), "MatMulNBits"),
        ("folded, K = 3", 8, with_blocks(8), "MatMulNBits"),
        ("folded, K = 3", 8, dynamic, "MatMulInteger"),
        ("data file", 4, with_blocks(4), "MatMulNBits"),
        ("data file", 8, with_blocks(8), "MatMulNBits"),
    ],
)
def test_every_matrix_is_quantised_and_the_graph_runs(graphs, tmp_path, kind, bits, quantise, operator):
    quantise(graphs[kind], tmp_path / "model.onnx")
    before, after = operators(graphs["shards"]), operators(tmp_path / "model.onnx")
    assert after[operator] == before["MatMul"] > 0
    assert after["MatMul"] == 0
    correlation = np.corrcoef(logits(graphs["shards"]).ravel(), logits(tmp_path / "model.onnx").ravel())[0, 1]
    assert correlation > SMALLEST[bits], correlation


def test_folding_keeps_the_logits_and_one_copy_of_the_weights(graphs):
    assert np.array_equal(logits(graphs["folded, K = 3"]), logits(graphs["shards"]))
    sizes = {graphs[f"folded, K = {steps}"].with_suffix(".onnx_data").stat().st_size for steps in (2, 3)}
    weights = graphs["shards"].with_name("model.safetensors").stat().st_size
    assert max(sizes) / min(sizes) < 1.02
    assert max(sizes) < 1.05 * weights


def test_optimised_model_runs_from_another_directory(graphs, tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "model.onnx")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "model.onnx_data")
    onnxruntime.InferenceSession(graphs["shards"], options, providers=["CPUExecutionProvider"])
    assert np.array_equal(logits(tmp_path / "model.onnx"), logits(graphs["shards"]))


def test_fp16_by_onnxruntime_transformers_runs(graphs, tmp_path):
    model = convert_float_to_float16(onnx.load(graphs["shards"]), keep_io_types=True)
    onnx.save(model, tmp_path / "model.onnx")
    correlation = np.corrcoef(logits(graphs["shards"]).ravel(), logits(tmp_path / "model.onnx").ravel())[0, 1]
    assert correlation > SMALLEST[16], correlation


def test_quantised_graph_of_others_runs_in_our_runtime(graphs, export):
    with_blocks(8)(graphs["folded, K = 3"], export / "mine.onnx")
    tokens = OnnxModel(export, "mine.onnx").generate(IDS, max_new_tokens=3, eos_token_ids=())
    assert tokens.shape == (1, 3)
