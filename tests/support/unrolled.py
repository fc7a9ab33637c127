"""A physically unrolled model, made by mergekit: the independent implementation of naive looping."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml


def slices(model: str | Path, ranges: Sequence[Sequence[int]]) -> dict:
    """A mergekit config: a passthrough merge that stacks these half-open ranges of a model's layers."""
    parts = [{"sources": [{"model": str(model), "layer_range": list(each)}]} for each in ranges]
    return {"slices": parts, "merge_method": "passthrough", "dtype": "float32"}


def unrolled(base: Path, out: Path, ranges: Sequence[Sequence[int]]) -> Path:
    """Save mergekit's passthrough merge of these half-open ranges of layers of a base.

    Args:
        base: the checkpoint.
        out: where to save.
        ranges: the layers, in order; to repeat a span, ranges overlap.
    """
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    merge_config = MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(slices(base, ranges))))
    run_merge(merge_config, str(out), MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True))
    return out
