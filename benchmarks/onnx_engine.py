"""Measure one engine on one export in its own process: memory, and seconds for prefills and decode steps.

    python benchmarks/onnx_engine.py onnx|torch ROOT --file model.onnx | --steps 6 [...]

Two engines in one process disturb each other: the idle threads of one session spin for a while on the cores that the
other needs. Prints a JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

# Runs tokens, `(batch, seq)`, on a cache (None: without one) and waits for the result.
Forward = Callable[[np.ndarray, Any], Any]
# Makes the cache of a prompt, `(batch, seq)`.
Fill = Callable[[np.ndarray], Any]


def onnx_engine(options) -> tuple[Forward, Fill]:
    """A graph in ONNX Runtime; a forward does not change its cache, so one cache serves all rounds."""
    from loopexport.onnx import OnnxModel

    model = OnnxModel(options.root, options.file, provider=options.provider, threads=options.threads)
    kept: list = []

    def fill(prompt):
        if not kept:
            kept.append(model.forward(prompt)[1])
        return kept[0]

    return (lambda tokens, cache: model.forward(tokens, cache=cache)), fill


def torch_engine(options) -> tuple[Forward, Fill]:
    """The export in transformers, eager."""
    import torch
    from transformers import AutoModelForCausalLM

    if options.threads:
        torch.set_num_threads(options.threads)
    device = "cuda" if options.provider == "cuda" else "cpu"
    load: Any = AutoModelForCausalLM.from_pretrained
    dtype = getattr(torch, DTYPES[options.dtype])
    model = load(options.root, trust_remote_code=True, dtype=dtype, loop_steps=options.steps).eval().to(device)

    @torch.no_grad()
    def forward(tokens, cache):
        result = model(torch.from_numpy(tokens).to(device), past_key_values=cache, use_cache=True)
        result.logits.cpu()
        return result.past_key_values

    return forward, lambda prompt: forward(prompt, None)


def seconds(forward: Forward, tokens: np.ndarray, make_cache: Callable[[], Any], rounds: int) -> list[float]:
    """Seconds for each forward after two uncounted ones; making the cache is not timed."""
    taken = []
    for _ in range(rounds + 2):
        cache = make_cache()
        start = time.perf_counter()
        forward(tokens, cache)
        taken.append(time.perf_counter() - start)
    return taken[2:]


def parse():
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=["onnx", "torch"])
    parser.add_argument("root")
    parser.add_argument("--file")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--provider", default="cpu")
    parser.add_argument("--past", type=int, default=128)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=8)
    return parser.parse_args()


def main() -> None:
    """Measure and print the results."""
    options = parse()
    prompt = np.random.default_rng(0).integers(3, 100, size=(1, options.past))
    before = psutil.Process().memory_info().rss
    forward, fill = {"onnx": onnx_engine, "torch": torch_engine}[options.engine](options)
    forward(prompt[:, :16], None)
    mib = (psutil.Process().memory_info().rss - before) / 2**20
    measured = {
        "mib": mib,
        "decode": seconds(forward, prompt[:, :1], lambda: fill(prompt), options.rounds),
        "prefill": seconds(forward, prompt, lambda: None, options.rounds),
    }
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
