"""Checkpoints for tests of what vLLM can do besides: quantised bases, adapters, physically unrolled copies."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def unrolled_checkpoint(base: Path, out: Path, order) -> Path:
    """A checkpoint whose layers are copies of those of a base, in this order; quantised as the base is."""
    out.mkdir(parents=True)
    for file in base.glob("*.json"):
        shutil.copy(file, out)
    config = json.loads((base / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "num_hidden_layers": len(order)}))
    saved: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        start, number, end = re.fullmatch(r"(?:(.*\.layers\.)(\d+))?(.*)", name).groups()
        places = [place for place, layer in enumerate(order) if number == str(layer)]
        saved |= {f"{start}{place}{end}": tensor.clone() for place in places} if number else {name: tensor}
    save_file(saved, out / "model.safetensors", metadata={"format": "pt"})
    return out


def save_adapter(base: Path, out: Path, rank: int, seed: int, merged: Path) -> Path:
    """A LoRA adapter in PEFT's format on all linear layers, with random numbers; and the base with it merged.

    Args:
        base: a tiny Llama.
        out: the adapter's directory.
        rank: of each pair of matrices.
        seed: of the random numbers.
        merged: the directory of the merged checkpoint.
    """
    generator = torch.Generator().manual_seed(seed)
    adapter, weights = {}, load_file(base / "model.safetensors")
    chosen = [name for name in weights if name.endswith("_proj.weight")]
    for name in chosen:
        rows, columns = weights[name].shape
        down, up = (0.15 * torch.randn(size, generator=generator) for size in ((rank, columns), (rows, rank)))
        module = f"base_model.model.{name.removesuffix('.weight')}"
        adapter |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
        weights[name] = weights[name] + 2 * up @ down
    targets = sorted({name.split(".")[-2] for name in chosen})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank}
    out.mkdir(parents=True)
    (out / "adapter_config.json").write_text(json.dumps({**config, "target_modules": targets, "bias": "none"}))
    save_file(adapter, out / "adapter_model.safetensors")
    merged.mkdir(parents=True)
    shutil.copy(base / "config.json", merged)
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    return out
