"""Checkpoints of zeros: valid files of any size that take no disk space, for tests and benchmarks without a model."""

from __future__ import annotations

import json
from pathlib import Path

HIDDEN = 64


def write_sparse_shard(path: Path, rows_by_tensor: dict[str, int]) -> None:
    """Write a safetensors file of bf16 tensors, `(rows, HIDDEN)`, all zeros; the data is a hole in the file."""
    header, offset = {}, 0
    for name, rows in rows_by_tensor.items():
        end = offset + rows * HIDDEN * 2
        header[name] = {"dtype": "BF16", "shape": [rows, HIDDEN], "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + offset)


def write_sparse_checkpoint(root: Path, shards: int, shard_bytes: int, layers_per_shard: int = 4) -> Path:
    """Write a Llama checkpoint of zeros; each shard has about `shard_bytes` bytes."""
    root.mkdir(parents=True)
    weight_map = {}
    rows = shard_bytes // (layers_per_shard * HIDDEN * 2)
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        layers = range(shard * layers_per_shard, (shard + 1) * layers_per_shard)
        tensors = {f"model.layers.{layer}.mlp.up_proj.weight": rows for layer in layers}
        if shard == 0:
            tensors |= {"model.embed_tokens.weight": 1, "model.norm.weight": 1}
        write_sparse_shard(root / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": shards * layers_per_shard,
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "torch_dtype": "bfloat16",
        "vocab_size": 100,
    }
    (root / "config.json").write_text(json.dumps(config))
    (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return root
