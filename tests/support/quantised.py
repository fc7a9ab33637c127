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


def by_compressed_tensors(base: Path, out: Path, num_bits: int, **options) -> Path:
    """Packed weights, one scale per `GROUP` weights, rounded to nearest.

    Args:
        base: the base.
        out: the checkpoint to write.
        num_bits: of each weight.
        **options: of `QuantizationArgs`, such as `strategy` and `symmetric`; "type" float makes fp8.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization import apply_quantization_config as prepare
    from compressed_tensors.quantization.utils import calculate_qparams

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    weights = QuantizationArgs(**{"num_bits": num_bits, "strategy": "group", "group_size": GROUP, **options})
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    prepare(model, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"], quantization_status="frozen"))
    sizes = {
        "group": (1, weights.group_size),
        "channel": (1, None),
        "tensor": (None, None),
        "block": weights.block_structure,
    }
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            rows, columns = (
                size or full for size, full in zip(sizes[weights.strategy], module.weight.shape, strict=True)
            )
            blocks = module.weight.detach().unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
            scale, zero = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), weights)
            module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
            if hasattr(module, "weight_zero_point"):
                module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))
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


def as_w8a8(base: Path, out: Path, kind="int") -> Path:
    """compressed-tensors, weights of 8 bits with one scale per row, and activations with one per token.

    Args:
        base: the base.
        out: the checkpoint to write.
        kind: of numbers, "int" or "float".
    """
    eight = {"num_bits": 8, "type": kind, "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**eight, "strategy": "channel", "dynamic": False},
        "input_activations": {**eight, "strategy": "token", "dynamic": True},
    }
    config = {"quant_method": "compressed-tensors", "format": f"{kind}-quantized", "quantization_status": "compressed"}

    def tensors(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = weight.abs().amax(1, keepdim=True) / (127 if kind == "int" else E4M3_MAX)
        codes = weight / scale
        codes = codes.round().to(torch.int8) if kind == "int" else codes.to(torch.float8_e4m3fn)
        return {name: codes, f"{name}_scale": scale}

    return _rewrite(base, out, {**config, "ignore": ["lm_head"], "config_groups": {"all": group}}, tensors)


def as_gptq(base: Path, out: Path, bits=4, group=GROUP, symmetric=True, layout="gptq", order=None) -> Path:
    """GPTQ: an int32 packs neighbouring weights of a column.

    Args:
        base: the base.
        out: the checkpoint to write.
        bits: of each weight.
        group: weights that share a scale; -1 for all of a row.
        symmetric: without zero points of their own.
        layout: "gptq" stores a zero point less 1, "gptq_v2" as it is.
        order: `g_idx` of a matrix with this many columns; None for neighbours.
    """
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": order is not None}
    config |= {"sym": symmetric, "checkpoint_format": layout}
    ones = sum(1 << place for place in range(0, 32, bits))

    def tensors(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        columns = weight.shape[1]
        codes, zeros, scales = rounded(weight, bits, group, symmetric)
        size = columns if group == -1 else group
        return _named(
            name,
            qweight=packed_words(codes, bits).T.contiguous(),
            qzeros=packed_words(zeros.T, bits) - (ones if layout == "gptq" else 0),
            scales=scales.T.half().contiguous(),
            g_idx=(torch.arange(columns) // size if order is None else order(columns)).int(),
        )

    _rewrite(base, out, config, tensors)
    (out / "quantize_config.json").write_text(json.dumps(config))
    return out


def as_awq(base: Path, out: Path, group=GROUP) -> Path:
    """AWQ, 4 bits, "gemm": an int32 packs eight weights of a row, in an order of its own."""
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}

    def tensors(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        codes, zeros, scales = rounded(weight, 4, group, symmetric=False)
        stored = [each.T.unflatten(1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1) for each in (codes, zeros)]
        return _named(
            name,
            qweight=packed_words(stored[0], 4),
            qzeros=packed_words(stored[1], 4),
            scales=scales.T.half().contiguous(),
        )

    _rewrite(base, out, config, tensors)
    (out / "quant_config.json").write_text(json.dumps(config))
    return out


def rounded(weight: torch.Tensor, bits: int, group: int, symmetric: bool) -> tuple[torch.Tensor, ...]:
    """Codes `(out, in)`, zero points and scales `(out, groups)` of a matrix, rounded to nearest."""
    groups = weight.float().unflatten(1, (-1, weight.shape[1] if group == -1 else group))
    lowest, highest = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if symmetric:
        lowest, highest = -torch.maximum(-lowest, highest), torch.maximum(-lowest, highest)
    scales = ((highest - lowest).clamp_min(1e-6) / (2**bits - 1)).half().float()
    zeros = torch.full_like(scales, 2 ** (bits - 1)) if symmetric else (-lowest / scales).round().clamp(0, 2**bits - 1)
    codes = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 2**bits - 1)
    return codes.flatten(1).long(), zeros.long(), scales


def restored(weight: torch.Tensor, bits: int, group: int, symmetric: bool) -> torch.Tensor:
    """What the codes of `rounded` stand for."""
    codes, zeros, scales = rounded(weight, bits, group, symmetric)
    size = weight.shape[1] // scales.shape[1]
    return (codes - zeros.repeat_interleave(size, 1)) * scales.repeat_interleave(size, 1)


def packed_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Neighbouring codes of a row in int32 words, the first one in the lowest bits."""
    words = (codes.unflatten(1, (-1, 32 // bits)) << (torch.arange(32 // bits) * bits)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


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
