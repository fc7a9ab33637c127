"""Run-time cost of the loop in a dense, a sparse, an MLA and a hybrid model: random weights, wide enough to matter.

Overhead is the time relative to the base, divided by the ratio of layer evaluations: 1.00 means that the loop costs
exactly its extra layers. All layers are of one kind, or the span has each kind in its share of the model, and the
vocabulary is small: layer evaluations measure the work.

    python benchmarks/bench_families.py
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import torch
from bench_forward import ROUNDS, decode, load, prefill
from measure import interleaved, ratio
from transformers import AutoConfig, AutoModelForCausalLM

import loopexport

PREFILL_TOKENS = 128
SPAN = (4, 8)
COMMON = {
    "vocab_size": 512,
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
}
MOE = {"moe_intermediate_size": 768, "num_experts_per_tok": 2}
FAMILIES = {
    "qwen3": {"head_dim": 64},
    "qwen3_moe": {**MOE, "num_experts": 8, "head_dim": 64},
    "deepseek_v3": {
        **MOE,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "num_key_value_heads": 12,
        "q_lora_rank": 384,
        "kv_lora_rank": 256,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "head_dim": 32,
    },
    "qwen3_5_text": {
        "head_dim": 64,
        "layer_types": [*["linear_attention"] * 3, "full_attention"] * 3,
        "linear_num_key_heads": 6,
        "linear_num_value_heads": 12,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
    },
}
SPECS = {
    "K=2": {"steps": 2},
    "K=6": {"steps": 6},
    "K=6 layer mode, frozen routing, norm interpolation": {
        "steps": 6,
        "mode": "layer",
        "anchor": 0.5,
        "frozen_routing": True,
        "norm_interpolation": True,
    },
}


def main(family: str, work: Path) -> None:
    """Measure one family and print the results."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family]})).save_pretrained(
        work / "base"
    )
    models, multipliers = {"base": load(work / "base")}, {}
    for number, (name, spec) in enumerate(SPECS.items()):
        export = loopexport.convert(str(work / "base"), work / f"export{number}", span=SPAN, weights="hardlink", **spec)
        models[name], multipliers[name] = load(export.root), export.cost.multiplier
    size = sum(parameter.numel() for parameter in models["base"].parameters())
    tokens = torch.randint(3, COMMON["vocab_size"], (1, PREFILL_TOKENS), generator=torch.Generator().manual_seed(0))
    print(f"{family}: {size / 1e6:.0f} M parameters, span {SPAN[0]}:{SPAN[1]} of {COMMON['num_hidden_layers']} layers")
    for label, action in (("prefill", prefill), ("decode", decode)):
        seconds = interleaved({name: partial(action, model, tokens) for name, model in models.items()}, ROUNDS)
        for name, multiplier in multipliers.items():
            against_base = ratio(seconds[name], seconds["base"])
            print(f"  {label} {name}: {against_base:.2f}x the time for {multiplier:.2f}x the layer evaluations, "
                  f"overhead {against_base / multiplier:.3f}")  # fmt: skip


if __name__ == "__main__":
    for name in FAMILIES:
        with tempfile.TemporaryDirectory() as directory:
            main(name, Path(directory))
