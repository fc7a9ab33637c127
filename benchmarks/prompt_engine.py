"""Run one engine on one prompt in its own process: peak memory, seconds to the first token and for each later one.

    python benchmarks/prompt_engine.py onnx|torch ROOT --tokens 4096 [--file model_fp32.onnx] [--new 16] [--threads 2]

Both compute the logits of the last position alone, as generation does; torch attends with sdpa. Prints a JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

# Generates this many tokens after a prompt, `(1, seq)`.
Generate = Callable[[np.ndarray, int], Iterator[Any]]


def onnx_engine(options) -> Generate:
    """A graph in ONNX Runtime."""
    from loopexport.onnx import OnnxModel

    model = OnnxModel(options.root, options.file, provider="cpu", threads=options.threads)
    return lambda prompt, new: model.stream(prompt, max_new_tokens=new, eos_token_ids=())


def torch_engine(options) -> Generate:
    """The export in transformers, greedy."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(options.threads)
    load: Any = AutoModelForCausalLM.from_pretrained
    model = load(options.root, trust_remote_code=True, dtype=torch.float32, attn_implementation="sdpa").eval()

    def generate(prompt: np.ndarray, new: int) -> Iterator[Any]:
        ids, cache = torch.from_numpy(prompt), None
        for _ in range(new):
            with torch.no_grad():
                result = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids, cache = result.logits[:, -1:].argmax(-1), result.past_key_values
            yield ids

    return generate


def peak_mib() -> float:
    """The largest resident size of this process so far."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def main() -> None:
    """Measure and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=["onnx", "torch"])
    parser.add_argument("root")
    parser.add_argument("--file")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    prompt = np.random.default_rng(0).integers(3, 100, size=(1, options.tokens))
    generate = {"onnx": onnx_engine, "torch": torch_engine}[options.engine](options)
    list(generate(prompt[:, :16], 2))  # what happens only once
    taken, start = [], time.perf_counter()
    for _ in generate(prompt, options.new):
        taken.append(time.perf_counter() - start)
        start = time.perf_counter()
    print(json.dumps({"peak_mib": peak_mib(), "prompt": taken[0], "token": statistics.median(taken[1:])}))


if __name__ == "__main__":
    main()
