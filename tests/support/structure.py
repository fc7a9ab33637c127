"""Classes of tiny families whose layers have the same structure.

`make test` runs the first family of each class. The matrix runs all of them, and `tests/records` keeps its records.
"""

from __future__ import annotations

import pytest

CLASSES: dict[str, tuple[str, ...]] = {
    "dense": ("llama", "qwen3", "olmo2", "granite"),
    "a sliding window in every layer": ("mistral",),
    "a sliding window in every other layer": ("gemma3_text", "gemma2", "qwen2"),
    "fused projections": ("phi3",),
    "absolute positions": ("gpt2",),
    "attention and MLP in parallel, a part of each head rotated": ("gpt_neox",),
    "sparse experts": ("qwen3_moe", "mixtral", "qwen2_moe"),
    "sparse experts, attention sinks": ("gpt_oss",),
    "sparse experts, chosen by corrected scores": ("glm4_moe",),
    "latent attention, sparse experts": ("deepseek_v3", "deepseek_v2"),
}
REPRESENTATIVES = tuple(families[0] for families in CLASSES.values())


def by_class(families, sample=REPRESENTATIVES):
    """Parameters for pytest: the families of `sample` always run, the others only with the matrix."""
    return [each if each in sample else pytest.param(each, marks=pytest.mark.matrix) for each in families]
