"""`genai_config.json`, which lets onnxruntime-genai run a graph.

Source: onnxruntime-genai 0.18, `src/config.h` and its model builder.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopexport.base.checkpoint import read_json
from loopexport.errors import CheckpointError
from loopexport.export.directory import Export
from loopexport.export.onnx_files import GENAI_CONFIG
from loopexport.loop.spec import LoopSpec

if TYPE_CHECKING:
    import onnx_ir as ir


def genai_config(export: Export, graph_name: str, graph: ir.Graph, spec: LoopSpec, attention: str) -> dict | None:
    """The config for one graph; None if onnxruntime-genai cannot run it.

    onnxruntime-genai needs all cache slots alike, with keys as wide as values; in MLA they are not.

    Args:
        export: the export.
        graph_name: the graph's file name.
        graph: the traced graph of the native model.
        spec: the loop of the graph.
        attention: the attention layout, "portable" or "gqa".
    """
    caches = [each.shape for each in graph.inputs if str(each.name).startswith("past_key_values.")]
    shapes = {(shape[1], shape[3]) for shape in caches if shape is not None}
    if len(shapes) != 1:
        return None
    ((kv_heads, head_size),) = shapes
    config, generation = export.base.config, _generation_config(export)
    num_layers = sum(1 for each in graph.outputs if str(each.name).endswith(".key"))
    num_slots = num_layers + len(spec.extra_slots) - len(spec.skipped(num_layers))
    inputs = {"input_ids": "input_ids", "attention_mask": "attention_mask"}
    if any(each.name == "position_ids" for each in graph.inputs):
        inputs["position_ids"] = "position_ids"
    context_length = _first(config, "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len") or 2048
    return {
        "model": {
            "type": "decoder",
            "vocab_size": config["vocab_size"],
            "context_length": context_length,
            **_special_tokens(generation, config["vocab_size"]),
            "decoder": {
                "session_options": {"provider_options": []},
                "filename": graph_name,
                "head_size": head_size,
                "hidden_size": _first(config, "hidden_size", "n_embd", "d_model"),
                "num_attention_heads": _first(config, "num_attention_heads", "n_head", "n_heads") or kv_heads,
                "num_key_value_heads": kv_heads,
                "num_hidden_layers": num_slots,
                "inputs": {
                    **inputs,
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        # Only GroupQueryAttention can share one buffer for past and present; with the portable layout it crashes.
        "search": {
            "max_length": context_length,
            "past_present_share_buffer": attention == "gqa",
            **_sampling(generation, config["vocab_size"]),
        },
    }


def genai_graph(root: Path) -> str | None:
    """The graph that a directory's config names; None if there is no readable config."""
    try:
        config = read_json(root / GENAI_CONFIG)
        return str(config["model"]["decoder"]["filename"])
    except (CheckpointError, KeyError, TypeError):
        return None


def _generation_config(export: Export) -> dict:
    """The fields that decide how to generate: like transformers, `generation_config.json` alone if there is one."""
    path = export.root / "generation_config.json"
    return read_json(path) if path.is_file() else export.base.config


def _special_tokens(generation: dict, vocab_size: int) -> dict:
    """The special tokens, without ids that onnxruntime-genai refuses and the model cannot make.

    Without any end token, transformers never stops, and onnxruntime-genai stops at the padding token.
    """
    tokens: dict[str, Any] = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = _token_ids(generation.get(name), vocab_size)
        if ids:
            tokens[name] = ids if name == "eos_token_id" and len(ids) > 1 else ids[0]
    ends = _token_ids(generation.get("eos_token_id"), vocab_size)
    return {**tokens, "pad_token_id": tokens.get("pad_token_id", ends[0])} if ends else tokens


def _token_ids(value: Any, vocab_size: int) -> list[int]:
    """The ids of a token id or of a list of them that are in the vocabulary."""
    numbers = [_number(each) for each in (value if isinstance(value, list) else [value])]
    return [int(each) for each in numbers if each is not None and each in range(vocab_size)]


def _sampling(generation: dict, vocab_size: int) -> dict:
    """How to sample. Values that onnxruntime-genai refuses are left out, or replaced by others that mean the same."""
    found: dict[str, Any] = {}
    if generation.get("do_sample") is not None:
        found["do_sample"] = bool(generation["do_sample"])
    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    numbers = {name: number for name in names if (number := _number(generation.get(name))) is not None}
    if numbers.get("temperature", -1) >= 0:
        found["temperature"] = numbers["temperature"]
    if "top_k" in numbers:
        found["top_k"] = min(max(int(numbers["top_k"]), 0), vocab_size)  # some write -1 for all tokens
    if 0 < numbers.get("top_p", -1) <= 1:
        found["top_p"] = numbers["top_p"]
    elif numbers.get("top_p") == 0:
        found["top_k"] = 1  # the likeliest token alone; onnxruntime-genai takes a top_p of 0 for none
    elif found.get("top_k") == 0:
        found["top_p"] = 1.0  # it needs one of the two
    if numbers.get("repetition_penalty", 0) > 0:
        found["repetition_penalty"] = numbers["repetition_penalty"]
    return found


def _number(value: Any) -> int | float | None:
    """A number, also one written as text; None for anything else."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None


def _first(config: dict, *names: str):
    return next((config[name] for name in names if config.get(name) is not None), None)
