"""Compare ONNX graphs with the export in torch."""

from __future__ import annotations

import numpy as np

import loopexport
import loopexport.onnx
from loopexport.onnx import OnnxModel
from loopexport.onnx.check.comparison import TOLERANCES, load_torch, make_scenarios, run_graph, run_torch
from support.compare import LARGEST
from support.tiny import VOCAB

# One family for each way in which graphs differ; the others run with the matrix.
QUICK_FAMILIES = ("llama", "gemma3_text", "gpt2", "qwen3_moe", "deepseek_v3")
# Families that GroupQueryAttention cannot run, and a part of the error.
BEYOND_FUSED = {
    "deepseek_v2": "changes keys after it stored them in the cache",
    "deepseek_v3": "changes keys after it stored them in the cache",
    "gpt_oss": "has no sinks",
}
FACTORS = [1.0 + 0.1 * index for index in range(8)]
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 1.0,
    "original_max_position_embeddings": 8, "short_factor": FACTORS, "long_factor": [3 * each for each in FACTORS],
}  # fmt: skip
LOOPS = (
    {"steps": 1},
    {"steps": 6},
    {"steps": 2, "kv": "per_step"},
)
MORE_LOOPS = (  # for a few families
    {"steps": 2},
    {"steps": 3, "kv": "reference"},
    {"steps": 3, "mode": "layer", "anchor": 0.5, "norm_interpolation": True},
)


def largest_difference(root, scenario):
    """The largest difference between a graph and torch, of the logits' scale, without padded tokens."""
    spec = loopexport.open_export(root).spec
    return relative_difference(OnnxModel(root), load_torch(root, spec.steps), scenario)


def relative_difference(graph, model, scenario):
    ours, theirs = run_graph(graph, scenario), run_torch(model, scenario)
    visible = scenario.visible
    return float(np.abs(ours - theirs)[visible].max() / np.abs(theirs[visible]).max())


def assert_equals_torch(root, padded=True):
    spec = loopexport.open_export(root).spec
    graph, model = OnnxModel(root), load_torch(root, spec.steps)
    for scenario in make_scenarios(VOCAB, spec):
        if not (padded or scenario.mask.all()):
            continue
        difference = relative_difference(graph, model, scenario)
        LARGEST.append(difference)
        assert difference <= TOLERANCES["fp32"], f"{scenario.name}: {difference:.3g} of the logits' scale"
