"""What a checkpoint's `quantization_config` says about its numbers, and which of it a graph can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loopexport.base.checkpoint import Checkpoint
from loopexport.errors import OnnxError
from loopexport.export.quantisation import BITS

INSTEAD = "convert the checkpoint that was not quantised"
PACKED = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense")  # of compressed-tensors
STRATEGIES = ("tensor", "channel", "group", "block")

# Methods that transformers can undo; the graph takes the model that this leaves.
UNDONE = {
    "bitsandbytes": "load it with transformers, call model.dequantize() and save_pretrained it",
    "mxfp4": "load it with transformers and Mxfp4Config(dequantize=True), and save_pretrained it",
}


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint was quantised.

    Attributes:
        method: "gptq", "awq", "compressed-tensors", "fp8" or "fbgemm_fp8".
        group_size: inputs that share a scale, as the config says; None for all of a row.
        symmetric: whether all zero points are `2 ** (bits - 1)`.
        zeros_one_less: whether the files have every zero point less 1.
        float_block: rows and columns that share a scale of floats; None for a whole tensor or row.
        rounds_activations: whether the quantised model rounds more than its weights.
    """

    method: str
    group_size: int | None = None
    symmetric: bool = True
    zeros_one_less: bool = False
    float_block: tuple[int, int] | None = None
    rounds_activations: bool = False


def read_scheme(checkpoint: Checkpoint) -> Scheme | None:
    """How a checkpoint was quantised; None for plain weights.

    Raises:
        OnnxError: in a way that a graph cannot hold; the message names it and says what to do.
    """
    method = checkpoint.quantisation
    if method is None:
        return None
    config = checkpoint.config.get("quantization_config") or checkpoint.text_config["quantization_config"]
    readers = {
        "gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed, "fp8": _fp8,
        "fbgemm_fp8": lambda values: Scheme("fbgemm_fp8", rounds_activations=True),
    }  # fmt: skip
    if method not in readers or not isinstance(config, dict):
        raise OnnxError(
            f"the base is quantised with {method}, and graphs take {', '.join(readers)}; {UNDONE.get(method, INSTEAD)}"
        )
    return readers[method](config)


def without_quantiser(config: Any) -> Any:
    """Take the quantiser out of a config of transformers, in place."""
    for each in (config, config.get_text_config()):
        if hasattr(each, "quantization_config"):
            del each.quantization_config
    return config


def _gptq(config: Mapping[str, Any]) -> Scheme:
    layout = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    if config.get("is_marlin_format"):
        layout = "marlin"
    _check_layout("gptq", layout, ("gptq", "gptq_v2"))
    _check_bits("gptq", config.get("bits"))
    symmetric = config.get("sym", True) is not False
    return Scheme("gptq", _group_size(config), symmetric, zeros_one_less=layout == "gptq")


def _awq(config: Mapping[str, Any]) -> Scheme:
    layout = "llm-awq" if config.get("backend") == "llm-awq" else config.get("format") or config.get("version")
    _check_layout("awq", str(layout or "gemm").lower(), ("gemm",))
    if config.get("bits", 4) != 4:
        raise OnnxError(f"awq with {config['bits']!r} bits: awq packs 4; {INSTEAD}")
    return Scheme("awq", _group_size(config), symmetric=False)


def _compressed(config: Mapping[str, Any]) -> Scheme:
    groups = [group for group in (config.get("config_groups") or {}).values() if isinstance(group, dict)]
    for layout in [config.get("format"), *(group.get("format") for group in groups)]:
        if layout not in (None, "mixed-precision"):
            _check_layout("compressed-tensors", str(layout), PACKED)
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    _check_layout("compressed-tensors, sparsity", str(sparsity), ("dense",))
    if (config.get("transform_config") or {}).get("config_groups"):
        raise OnnxError(f"compressed-tensors with transform_config rotates the activations, too; {INSTEAD}")
    weights = [group["weights"] for group in groups if isinstance(group.get("weights"), dict)]
    for each in weights:
        _check_compressed(each)
    sizes = {each.get("group_size") for each in weights if each.get("strategy") == "group"}
    blocks = {tuple(each["block_structure"]) for each in weights if each.get("strategy") == "block"}
    if len(blocks) > 1:
        raise OnnxError(f"compressed-tensors with several block_structure ({sorted(blocks)}); {INSTEAD}")
    return Scheme(
        "compressed-tensors",
        sizes.pop() if len(sizes) == 1 else None,
        float_block=blocks.pop() if blocks else None,
        rounds_activations=bool(config.get("kv_cache_scheme")) or any(each.get("input_activations") for each in groups),
    )


def _check_compressed(weights: Mapping[str, Any]) -> None:
    if weights.get("type", "int") == "int":
        _check_bits("compressed-tensors", weights.get("num_bits"))
    if weights.get("actorder") in ("group", "dynamic", True):
        raise act_order("compressed-tensors", f"actorder {weights['actorder']!r}")
    if weights.get("strategy") not in (None, *STRATEGIES):
        raise OnnxError(
            f"compressed-tensors with strategy {weights['strategy']!r}, and graphs take {', '.join(STRATEGIES)}; "
            f"{INSTEAD}"
        )


def _fp8(config: Mapping[str, Any]) -> Scheme:
    if config.get("expert_dtype", "fp8") != "fp8":
        raise OnnxError(f"fp8 with expert_dtype {config['expert_dtype']!r}, and graphs take fp8; {INSTEAD}")
    block = config.get("weight_block_size")
    rows, columns = block if block else (0, 0)
    return Scheme("fp8", float_block=(rows, columns) if block else None, rounds_activations=True)


def act_order(method: str, what: str) -> OnnxError:
    """The error for a checkpoint whose blocks are not neighbouring columns."""
    return OnnxError(
        f"{method} in act-order ({what}): a scale there belongs to columns that are not neighbours, and a graph's "
        f"does; take a checkpoint without act-order (desc_act false), or {INSTEAD}"
    )


def _group_size(config: Mapping[str, Any]) -> int | None:
    size = config.get("group_size", 128)
    return size if isinstance(size, int) and size > 0 else None


def _check_layout(method: str, layout: str, allowed: tuple[str, ...]) -> None:
    if layout not in allowed:
        raise OnnxError(f"{method} in the format {layout!r}, and graphs take {', '.join(allowed)}; {INSTEAD}")


def _check_bits(method: str, bits: Any) -> None:
    if bits not in BITS.values():
        raise OnnxError(
            f"{method} with {bits!r} bits, and graphs take {' or '.join(map(str, BITS.values()))}; {INSTEAD}"
        )
