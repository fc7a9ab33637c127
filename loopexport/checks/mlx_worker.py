"""Logits of models in MLX, in a separate process. Imports mlx-lm, but nothing of LoopExport.

    python mlx_worker.py RUNS.json OUT

RUNS.json is a list of objects with `model`, a directory; `fields`, fields of its config to change; `tokens`, token ids,
`(batch, seq)`; and `chunks`, the lengths of forwards through one cache. In the directory OUT, each run leaves
`N.npz` with `full`, the logits of one forward without a cache, and `cached`, those of the chunks; and `outcomes.json`
gets one object for each: `settings`, a sentence about the run, or `error`. All is computed in fp32.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

import numpy as np


def main(runs: str, out: str) -> None:
    """Run the models of one file, and write the outcomes so far after each run."""
    outcomes: list[dict] = []
    for number, run in enumerate(json.loads(Path(runs).read_text())):
        try:
            logits, settings = compute(**run)
            np.savez(Path(out) / f"{number}.npz", **logits)
            outcomes.append({"settings": settings})
        except Exception as error:  # anything may stop a model; the next one may still run
            traceback.print_exc()
            outcomes.append({"error": str(error) or type(error).__name__})
        (Path(out) / "outcomes.json").write_text(json.dumps(outcomes))


def compute(model: str, tokens: list[list[int]], chunks: list[int], fields: dict | None = None) -> tuple[dict, str]:
    """The logits of one model, and in which setting."""
    import mlx.core as mx
    import mlx_lm
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    loaded, _ = load_model(Path(model), model_config=fields or {}, trust_remote_code=True)
    loaded.set_dtype(mx.float32)
    cache = make_prompt_cache(loaded)
    ids = np.array(tokens)
    pieces = np.split(ids, np.cumsum(chunks)[:-1], axis=1)
    logits = {
        "full": np.array(loaded(mx.array(ids))),
        "cached": np.concatenate([np.array(loaded(mx.array(piece), cache=cache)) for piece in pieces], axis=1),
    }
    settings = f"mlx-lm {mlx_lm.__version__}, {mx.default_device().type.name} in fp32, {len(cache)} cache slots"
    return logits, settings


if __name__ == "__main__":
    main(*sys.argv[1:])
