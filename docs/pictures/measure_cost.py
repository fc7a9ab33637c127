"""Measure what K costs on a real model, for `cost.py` to draw.

    python docs/pictures/measure_cost.py MODEL

One looped model is loaded and its `loop_steps` is changed, in turn with the native base. Each figure is the median of
the ratios of time within rounds. The result goes to `docs/pictures/data/cost.json`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import loopexport

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from measure import interleaved, ratio

DATA = Path(__file__).parent / "data" / "cost.json"
SPAN = (13, 17)
STEPS = (1, 2, 3, 4, 6, 8)
PREFILL_TOKENS, DECODE_TOKENS, ROUNDS = 128, 16, 9


@torch.no_grad()
def prefill(model, tokens, steps: int | None) -> float:
    """Seconds of one forward over the prompt."""
    _set_steps(model, steps)
    start = time.perf_counter()
    model(tokens)
    return time.perf_counter() - start


@torch.no_grad()
def decode(model, tokens, steps: int | None) -> float:
    """Seconds of the decode steps behind the prompt."""
    _set_steps(model, steps)
    cache = model(tokens, use_cache=True).past_key_values
    start = time.perf_counter()
    for _ in range(DECODE_TOKENS):
        model(tokens[:, :1], past_key_values=cache)
    return time.perf_counter() - start


def _set_steps(model, steps: int | None) -> None:
    if steps is not None:
        model.config.loop_damping = None
        model.config.loop_steps = steps


def measure(base: Path, work: Path) -> dict:
    """All points, as `cost.json` has them."""
    export = loopexport.convert(str(base), work / "export", span=SPAN, steps=2)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    looped = AutoModelForCausalLM.from_pretrained(export.root, trust_remote_code=True, dtype=torch.float32).eval()
    tokens = torch.randint(3, plain.config.vocab_size, (1, PREFILL_TOKENS), generator=torch.Generator().manual_seed(0))
    points: dict[int, dict[str, float]] = {steps: {} for steps in STEPS}
    for label, action in (("prefill", prefill), ("decode", decode)):
        actions = {steps: partial(action, looped, tokens, steps) for steps in STEPS}
        seconds = interleaved({None: partial(action, plain, tokens, None), **actions}, ROUNDS)
        for steps in STEPS:
            points[steps][label] = round(ratio(seconds[steps], seconds[None]), 3)
    return {
        "model": base.name,
        "layers": plain.config.num_hidden_layers,
        "span": list(SPAN),
        "threads": torch.get_num_threads(),
        "prefill_tokens": PREFILL_TOKENS,
        "decode_tokens": DECODE_TOKENS,
        "rounds": ROUNDS,
        "points": [{"steps": steps, **values} for steps, values in points.items()],
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        DATA.write_text(json.dumps(measure(Path(sys.argv[1]), Path(directory)), indent=2) + "\n")
