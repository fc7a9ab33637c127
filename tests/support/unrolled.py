"""A physically unrolled model, made by mergekit: the independent implementation of naive looping."""

from __future__ import annotations

from pathlib import Path


def unrolled(base: Path, out: Path, span: tuple[int, int], num_layers: int) -> Path:
    """Save mergekit's passthrough merge of a base, with the span's layers a second time after the span.

    Args:
        base: the checkpoint.
        out: where to save.
        span: half-open.
        num_layers: number of layers of the base.
    """
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    ranges = [(0, span[1]), (span[0], num_layers)]
    slices = [{"sources": [{"model": str(base), "layer_range": list(each)}]} for each in ranges]
    config = {"slices": slices, "merge_method": "passthrough", "dtype": "float32"}
    merge_config = MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(config)))
    run_merge(merge_config, str(out), MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True))
    return out
