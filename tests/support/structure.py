"""Which family stands for which: the tiny families by what sets their layers apart.

The first of each class is run in `make test`. The whole class is run with the matrix, whose records are kept in
`tests/records`.
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
    """Families as pytest takes them: those of `sample`, and the others with the matrix."""
    return [each if each in sample else pytest.param(each, marks=pytest.mark.matrix) for each in families]
