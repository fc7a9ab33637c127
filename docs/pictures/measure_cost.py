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
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import loopexport

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from measure import interleaved, ratio

DATA = Path(__file__).parent / "data" / "cost.json"
SPAN = (13, 17)
STEPS = (1, 2, 3, 4, 6, 8)
PREFILL_TOKENS, DECODE_TOKENS, ROUNDS, THREADS = 128, 8, 5, 1


class Runner:
    """A model at one K, with a cache of its own that decoding goes on with.

    Attributes:
        model: the base, or the looped model, which all K share.
        steps: K; None for the base.
    """

    def __init__(self, model, steps: int | None, tokens):
        self.model, self.steps, self.tokens = model, steps, tokens
        self.cache = None

    @torch.no_grad()
    def prefill(self) -> float:
        """Seconds of one forward over the prompt."""
        self._set_steps()
        start = time.perf_counter()
        self.cache = self.model(self.tokens, use_cache=True).past_key_values
        return time.perf_counter() - start

    @torch.no_grad()
    def decode(self) -> float:
        """Seconds of some decode steps behind the latest prefill."""
        self._set_steps()
        start = time.perf_counter()
        for _ in range(DECODE_TOKENS):
            self.model(self.tokens[:, :1], past_key_values=self.cache)
        return time.perf_counter() - start

    def _set_steps(self) -> None:
        if self.steps is not None:
            self.model.config.loop_steps = self.steps


def measure(base: Path, work: Path) -> dict:
    """All points, as `cost.json` has them."""
    torch.set_num_threads(THREADS)
    export = loopexport.convert(str(base), work / "export", span=SPAN, steps=2)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    looped = AutoModelForCausalLM.from_pretrained(export.root, trust_remote_code=True, dtype=torch.float32).eval()
    tokens = torch.randint(3, plain.config.vocab_size, (1, PREFILL_TOKENS), generator=torch.Generator().manual_seed(0))
    runners = {None: Runner(plain, None, tokens), **{steps: Runner(looped, steps, tokens) for steps in STEPS}}
    points: dict[int, dict[str, float]] = {steps: {} for steps in STEPS}
    for label in ("prefill", "decode"):
        seconds = interleaved({steps: getattr(runner, label) for steps, runner in runners.items()}, ROUNDS)
        for steps in STEPS:
            points[steps][label] = round(ratio(seconds[steps], seconds[None]), 3)
        print(label, {steps: values[label] for steps, values in points.items()}, flush=True)
    return {
        "model": base.name,
        "layers": plain.config.num_hidden_layers,
        "span": list(SPAN),
        "threads": THREADS,
        "prefill_tokens": PREFILL_TOKENS,
        "decode_tokens": DECODE_TOKENS,
        "rounds": ROUNDS,
        "points": [{"steps": steps, **values} for steps, values in points.items()],
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        DATA.write_text(json.dumps(measure(Path(sys.argv[1]), Path(directory)), indent=2) + "\n")
