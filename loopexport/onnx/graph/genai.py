"""`genai_config.json`, which lets onnxruntime-genai run a graph.

Source: onnxruntime-genai 0.18, `src/config.h` and its model builder.
"""

from __future__ import annotations

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
    num_slots = sum(1 for each in graph.outputs if str(each.name).endswith(".key")) + spec.extra_kv_slots
    inputs = {"input_ids": "input_ids", "attention_mask": "attention_mask"}
    if any(each.name == "position_ids" for each in graph.inputs):
        inputs["position_ids"] = "position_ids"
    context_length = _first(config, "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len") or 2048
    return {
        "model": {
            "type": "decoder",
            "vocab_size": config["vocab_size"],
            "context_length": context_length,
            **_special_tokens(config, generation),
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
            **_sampling(generation),
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
    path = export.root / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def _special_tokens(config: dict, generation: dict) -> dict:
    tokens: dict[str, Any] = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = generation.get(name, config.get(name))
        if value is not None:
            tokens[name] = value
    if "eos_token_id" in tokens and "pad_token_id" not in tokens:
        eos = tokens["eos_token_id"]
        tokens["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
    return tokens


def _sampling(generation: dict) -> dict:
    names = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
    return {name: generation[name] for name in names if generation.get(name) is not None}


def _first(config: dict, *names: str):
    return next((config[name] for name in names if config.get(name) is not None), None)
