"""Checkpoints that are quantised already: their codes, scales and zero points, and what is refused."""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from loopexport.base.checkpoint import open_checkpoint
from loopexport.errors import OnnxError
from loopexport.export.quantisation import BLOCK_SIZES
from loopexport.onnx.weights.source import Weights
from loopexport.onnx.weights.stored_scheme import read_scheme
from support.quantised import GROUP, as_awq, as_fp8, as_gptq, by_compressed_tensors, restored
from support.tiny import save_tiny

GPTQ = [
    {"bits": bits, "group": group, "symmetric": symmetric, "layout": layout}
    for bits, group in ((4, 32), (4, -1), (8, 16))
    for symmetric in (True, False)
    for layout in ("gptq", "gptq_v2")
]
COMPRESSED = [
    {"num_bits": 4},
    {"num_bits": 8, "symmetric": False},
    {"num_bits": 4, "strategy": "channel", "group_size": None, "symmetric": False},
    {"num_bits": 8, "type": "float", "strategy": "channel", "group_size": None},
    {"num_bits": 8, "type": "float", "strategy": "tensor", "group_size": None},
    {"num_bits": 8, "type": "float", "strategy": "block", "group_size": None, "block_structure": [GROUP, GROUP]},
]
ORDER = "q_proj"  # the module of which a test damages the tensors


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("stored") / "base")


def weights_of(root):
    return Weights(open_checkpoint(root))


def assert_reads(root, base, restore):
    """The virtual tensors are those of the base, and quantised ones have the values of `restore(name, weight)`."""
    weights, plain = weights_of(root), load_file(base / "model.safetensors")
    assert set(weights.tensors) == set(plain)
    assert len(weights.matrices) == 7 * 6
    for name, weight in plain.items():
        expected = restore(name, weight) if name in weights.matrices else weight
        assert weights.tensors[name].shape == weight.shape
        assert torch.equal(weights.read(name), expected.float()), name
    return weights


@pytest.mark.parametrize("options", GPTQ, ids=lambda options: "-".join(map(str, options.values())))
def test_gptq_is_read_bit_for_bit(base, tmp_path, options):
    root = as_gptq(base, tmp_path / "q", **options)
    bits, group, symmetric, _ = options.values()
    weights = assert_reads(root, base, lambda name, weight: restored(weight, bits, group, symmetric))
    matrix = weights.quantised("model.layers.0.mlp.down_proj.weight")
    assert matrix.bits == bits
    assert matrix.block_size == (32 if group == -1 else group)
    assert (matrix.zero_points is None) == symmetric


def test_awq_is_read_bit_for_bit(base, tmp_path):
    weights = assert_reads(as_awq(base, tmp_path / "q"), base, lambda name, weight: restored(weight, 4, GROUP, False))
    assert weights.quantised("model.layers.0.mlp.up_proj.weight").zero_points is not None
    assert weights.quantised("lm_head.weight") is weights.quantised("model.norm.weight") is None


@pytest.mark.parametrize("options", COMPRESSED, ids=lambda options: "-".join(map(str, options.values())))
def test_compressed_tensors_are_read_as_the_library_does(base, tmp_path, options):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    root = by_compressed_tensors(base, tmp_path / "q", **options)
    undo = CompressedTensorsConfig(run_compressed=False)
    theirs = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32, quantization_config=undo).state_dict()
    weights = assert_reads(root, base, lambda name, weight: theirs[name])
    has_codes = weights.quantised("model.layers.0.mlp.up_proj.weight") is not None
    assert has_codes == (options.get("type") != "float")


def test_a_byte_for_each_code_is_read_as_the_definition_says(base, tmp_path):
    """compressed-tensors "int-quantized": the code of a weight is a number with a sign."""
    root = by_compressed_tensors_bytes(base, tmp_path / "q")
    tensors = load_file(root / "model.safetensors")
    assert_reads(root, base, lambda name, weight: tensors[name].float() * tensors[f"{name}_scale"])


def by_compressed_tensors_bytes(base, out):
    out.mkdir()
    groups = {"all": {"weights": {"num_bits": 8, "type": "int", "strategy": "channel"}, "input_activations": {}}}
    quantisation = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": groups}
    config = json.loads((base / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))
    saved = {}
    for name, weight in load_file(base / "model.safetensors").items():
        scale = weight.abs().amax(-1, keepdim=True) / 127
        is_chosen = name.endswith("_proj.weight")
        saved |= (
            {name: (weight / scale).round().to(torch.int8), f"{name}_scale": scale} if is_chosen else {name: weight}
        )
    save_file(saved, out / "model.safetensors")
    return out


def test_fp8_is_read_as_transformers_does(base, tmp_path):
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    root = as_fp8(base, tmp_path / "q")
    undo = FineGrainedFP8Config(dequantize=True, weight_block_size=(GROUP, GROUP))
    theirs = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32, quantization_config=undo).state_dict()
    weights = assert_reads(root, base, lambda name, weight: theirs[name])
    assert weights.quantised("model.layers.0.mlp.up_proj.weight") is None


def test_short_last_blocks_of_fp8_have_their_own_scales():
    from loopexport.onnx.weights.stored_matrices import StoredMatrix
    from loopexport.onnx.weights.stored_scheme import Scheme
    from loopexport.onnx.weights.stored_values import read_floats

    stored = {"codes": torch.ones(5, 7).to(torch.float8_e4m3fn), "scales": torch.arange(1.0, 7).reshape(2, 3)}
    matrix = StoredMatrix("w", "float", (5, 7), {"codes": "codes", "scales": "scales"})
    found = read_floats(matrix, Scheme("fp8", float_block=(4, 3)), stored.__getitem__)
    expected = torch.tensor([[1, 1, 1, 2, 2, 2, 3]] * 4 + [[4, 4, 4, 5, 5, 5, 6]]).float()
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("group", "columns", "block", "repeats"),
    [(32, 96, 32, 1), (512, 1024, 256, 2), (96, 192, 32, 3), (1024, 1024, 128, 0), (75, 75, 16, 0), (48, 96, 16, 3)],
)
def test_a_group_is_a_whole_number_of_blocks(group, columns, block, repeats):
    from loopexport.onnx.weights.stored_matrices import _layout

    layout = _layout("m", 4, group, columns, True)
    assert (layout.block_size, layout.repeats) == (block, repeats)
    assert block in BLOCK_SIZES


# ---------------------------------------------------------------------------------------------------------------------
# Refused.
# ---------------------------------------------------------------------------------------------------------------------

PACK = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


def packed(**weights):
    return {**PACK, "config_groups": {"all": {"weights": {"num_bits": 4, "strategy": "group", **weights}}}}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"load_in_4bit": True}, "quantised with bitsandbytes, .*model.dequantize"),
        ({"quant_method": "mxfp4"}, "quantised with mxfp4, .*Mxfp4Config"),
        ({"quant_method": "hqq"}, "quantised with hqq, and graphs take gptq, awq"),
        ({"quant_method": "gptq", "bits": 3}, "gptq with 3 bits, and graphs take 4 or 8"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "the format 'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "the format 'marlin'"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq in the format 'gemv', and graphs take gemm"),
        ({"quant_method": "awq", "bits": 4, "backend": "llm-awq"}, "awq in the format 'llm-awq'"),
        ({"quant_method": "awq", "bits": 8}, "awq with 8 bits"),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, "expert_dtype 'fp4'"),
        ({**PACK, "format": "nvfp4-pack-quantized"}, "the format 'nvfp4-pack-quantized'"),
        ({**packed(), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity in the format 'sparse-24"),
        ({**packed(), "transform_config": {"config_groups": {"R1": {}}}}, "rotates the activations"),
        (packed(num_bits=3), "compressed-tensors with 3 bits"),
        (packed(actorder="group"), "act-order .actorder 'group'"),
        (packed(strategy="tensor_group"), "strategy 'tensor_group'"),
    ],
)
def test_other_quantisations_are_refused_by_name(config, says):
    method = config.get("quant_method", "bitsandbytes")
    checkpoint = SimpleNamespace(quantisation=method, config={"quantization_config": config})
    with pytest.raises(OnnxError, match=says) as error:
        read_scheme(checkpoint)
    assert "\n" not in str(error.value)


def damaged(root, **tensors):
    """Replace tensors of one module, each by what a function makes of it; None drops it."""
    saved = load_file(root / "model.safetensors")
    for suffix, function in tensors.items():
        name = f"model.layers.1.self_attn.{ORDER}.{suffix}"
        old = saved.pop(name)
        saved |= {} if function is None else {name: function(old)}
    save_file(saved, root / "model.safetensors")
    return root


@pytest.mark.parametrize(
    ("make", "damage", "says"),
    [
        (as_gptq, {"g_idx": lambda order: order.flip(0)}, "gptq in act-order .model.layers.1.self_attn.q_proj"),
        (as_gptq, {"qzeros": None}, "no tensor model.layers.1.self_attn.q_proj.qzeros"),
        (as_gptq, {"qweight": lambda words: words[:-1].contiguous()}, "no matrix of gptq in 4 or 8 bits"),
        (partial(as_gptq, group=8), {}, "a scale for every 8 columns, and a graph takes multiples of 16"),
        (as_awq, {"qweight": lambda words: words[:, 1:].contiguous()}, "no matrix of awq"),
        (as_fp8, {"weight_scale_inv": None}, "stored as F8_E4M3 without"),
        (as_fp8, {"weight_scale_inv": lambda scales: torch.ones(3, 1)}, "has the shape .3, 1. for a weight"),
    ],
)
def test_damaged_matrices_are_refused_by_name(base, tmp_path, make, damage, says):
    with pytest.raises(OnnxError, match=says):
        weights_of(damaged(make(base, tmp_path / "q"), **damage))


def test_zero_points_that_the_config_denies_are_refused(base, tmp_path):
    root = damaged(as_gptq(base, tmp_path / "q"), qzeros=lambda words: words + 1)
    with pytest.raises(OnnxError, match="has zero points, and the config says that it is symmetric"):
        weights_of(root).read(f"model.layers.1.self_attn.{ORDER}.weight")


def test_act_order_that_is_none_is_read(base, tmp_path):
    """desc_act with one group, or with groups in place, keeps neighbours together."""
    root = as_gptq(base, tmp_path / "q", order=lambda columns: torch.arange(columns) // GROUP)
    assert_reads(root, base, lambda name, weight: restored(weight, 4, GROUP, True))


def test_plain_weights_with_a_quantised_config_are_refused(base, tmp_path):
    root = as_gptq(base, tmp_path / "q")
    save_file(load_file(base / "model.safetensors"), root / "model.safetensors")
    with pytest.raises(OnnxError, match="no tensor is stored so"):
        weights_of(root)
