"""Tiny quantised checkpoints: made by the libraries, or by hand where a library does not run on a CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

GROUP = 32  # number of weights that share a scale
E4M3_MAX = 448.0


# ---------------------------------------------------------------------------------------------------------------------
# By the libraries.
# ---------------------------------------------------------------------------------------------------------------------


def by_torchao(base: Path, out: Path) -> Path:
    """int8 weights, one scale per row."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return _save_loaded(base, out, TorchAoConfig(Int8WeightOnlyConfig()))


def by_bitsandbytes_4bit(base: Path, out: Path) -> Path:
    """nf4 weights, one scale per 64 weights."""
    from transformers import BitsAndBytesConfig

    return _save_loaded(base, out, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))


def by_bitsandbytes_8bit(base: Path, out: Path) -> Path:
    """int8 weights and activations (LLM.int8)."""
    from transformers import BitsAndBytesConfig

    return _save_loaded(base, out, BitsAndBytesConfig(load_in_8bit=True))


def _save_loaded(base: Path, out: Path, config) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(out)
    return out


def by_compressed_tensors(base: Path, out: Path, num_bits: int) -> Path:
    """Packed weights, one scale per `GROUP` weights, rounded to nearest."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization import apply_quantization_config as prepare
    from compressed_tensors.quantization.utils import calculate_qparams

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    weights = QuantizationArgs(num_bits=num_bits, strategy="group", group_size=GROUP)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    prepare(model, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"], quantization_status="frozen"))
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            groups = module.weight.detach().unflatten(1, (-1, GROUP))
            scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), module.quantization_scheme.weights)
            module.weight_scale.data.copy_(scale)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(out)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# By hand: the names, dtypes and shapes of each format; the values of the base where that is simple.
# ---------------------------------------------------------------------------------------------------------------------


def as_fp8(base: Path, out: Path) -> Path:
    """DeepSeek's format: e4m3 weights, and one `weight_scale_inv` per block of `GROUP` x `GROUP` weights."""
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
    return _rewrite(base, out, {**config, "weight_block_size": [GROUP, GROUP]}, _fp8_tensors)


def _fp8_tensors(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    rows, columns = (-(-size // GROUP) for size in weight.shape)
    padded = torch.zeros(rows * GROUP, columns * GROUP)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.unflatten(1, (columns, GROUP)).unflatten(0, (rows, GROUP))  # (rows, GROUP, columns, GROUP)
    scale = blocks.abs().amax((1, 3)).clamp_min(1e-12) / E4M3_MAX
    scaled = (blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1)[: weight.shape[0], : weight.shape[1]]
    return {name: scaled.to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}


def as_gptq(base: Path, out: Path) -> Path:
    """GPTQ, 4 bits: an int32 packs eight weights of a column. Random, because nothing here can run it."""
    config = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}

    def tensors(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        rows, columns = weight.shape
        return _named(
            name,
            qweight=_int32(columns // 8, rows),
            qzeros=_int32(columns // GROUP, rows // 8),
            scales=torch.rand(columns // GROUP, rows).half(),
            g_idx=torch.arange(columns, dtype=torch.int32) // GROUP,
        )

    _rewrite(base, out, config, tensors)
    (out / "quantize_config.json").write_text(json.dumps(config))
    return out


def as_awq(base: Path, out: Path) -> Path:
    """AWQ, 4 bits, "gemm": an int32 packs eight weights of a row. Random, because nothing here can run it."""
    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}

    def tensors(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        rows, columns = weight.shape
        return _named(
            name,
            qweight=_int32(columns, rows // 8),
            qzeros=_int32(columns // GROUP, rows // 8),
            scales=torch.rand(columns // GROUP, rows).half(),
        )

    _rewrite(base, out, config, tensors)
    (out / "quant_config.json").write_text(json.dumps(config))
    return out


def as_mxfp4(base: Path, out: Path) -> Path:
    """gpt-oss's format: experts of 4-bit floats, one exponent per 32. Random, small numbers."""
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return _rewrite(base, out, {"quant_method": "mxfp4", "modules_to_not_convert": kept}, _mxfp4_tensors)


def _mxfp4_tensors(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    experts, columns, rows = weight.shape  # fused experts are stored transposed; their blocks are not
    generator = torch.Generator().manual_seed(len(name))
    return {
        f"{name}_blocks": torch.randint(256, (experts, rows, columns // 32, 16), generator=generator).byte(),
        f"{name}_scales": torch.full((experts, rows, columns // 32), 127 - 5).byte(),  # exponent -5
    }


def _named(name: str, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    module = name.removesuffix("weight")
    return {module + suffix: tensor for suffix, tensor in tensors.items()}


def _int32(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=torch.Generator().manual_seed(0)).int()


def _rewrite(base: Path, out: Path, quantization: dict, tensors: Callable) -> Path:
    """Save a base with each projection of its layers replaced by the tensors of `tensors(name, weight)`."""
    out.mkdir(parents=True)
    config = json.loads((base / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    fused = quantization["quant_method"] == "mxfp4"
    saved: dict[str, torch.Tensor] = {}
    for name, weight in load_file(base / "model.safetensors").items():
        chosen = name.endswith(("_up_proj", "down_proj")) if fused else name.endswith("_proj.weight")
        saved |= tensors(name, weight) if chosen else {name: weight}
    save_file(saved, out / "model.safetensors", metadata={"format": "pt"})
    return out
