"""Types of the keywords and answers that are one of a few words. `typing.get_args` gives the words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

Bounds: TypeAlias = str | tuple[int, int]
Span: TypeAlias = Bounds | Sequence[Bounds]
LayerPath: TypeAlias = str | Sequence[str | int | tuple[int, int]]
RysPair: TypeAlias = str | tuple[int, int]

# Fields of the loop. `templates/looped_spec.py` has the same words, because an export must not import LoopExport.
Mode: TypeAlias = Literal["block", "layer"]
KvPolicy: TypeAlias = Literal["shared", "per_step", "reference"]
DecodeMode: TypeAlias = Literal["full", "bypass", "first_n"]
RuleName: TypeAlias = Literal[
    "euler",
    "residual_scaled",
    "ema",
    "ema_sched",
    "midpoint",
    "heun",
    "rk4",
    "heavy_ball",
    "anderson",
    "aitken",
    "norm_stab",
    "poly_blend",
    "input_anchor",
    "uniform",
]

# How weights get into a directory.
Placement: TypeAlias = Literal["auto", "reflink", "hardlink", "copy"]
Weights: TypeAlias = Literal["auto", "reflink", "hardlink", "copy", "none"]

OnnxDtype: TypeAlias = Literal["as-is", "fp16", "bf16", "fp32", "int8", "int4"]
Compute: TypeAlias = Literal["fp32", "fp16", "bf16"]
Attention: TypeAlias = Literal["portable", "gqa"]
Provider: TypeAlias = Literal["auto", "cuda", "cpu"]
Runtime: TypeAlias = Literal["transformers", "vllm", "mlx"]
Backend: TypeAlias = Literal["hf", "vllm"]

# Why a generation ended: an end token in every row, max_new_tokens, or a full table of positions.
FinishReason: TypeAlias = Literal["end", "length", "positions"]
