"""ONNX graphs of K = 1 and K = 6 against each other and against torch: export time, memory, prefill and decode.

    python benchmarks/bench_onnx.py MODEL [--span 13:17] [--provider cuda --dtype fp16] [--past 128] [--threads 2]

All ratios are of one run. On CUDA, give --dtype fp16 and bf16 in turn.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measure import interleaved, ratio, run_process
from transformers import AutoModelForCausalLM

import loopexport
from loopexport.onnx import OnnxModel
from loopexport.onnx.names import data_name, graph_name

MANY = 6
TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Prints the resident MiB of a process that holds a session, after a run.
MEMORY = """
import sys, psutil, numpy
from loopexport.onnx import OnnxModel
before = psutil.Process().memory_info().rss
model = OnnxModel(sys.argv[1], sys.argv[2], provider=sys.argv[3])
model.forward(numpy.ones((1, 16), dtype=numpy.int64))
print((psutil.Process().memory_info().rss - before) / 2**20)
"""


def export(root: Path, steps: str, dtype: str) -> float:
    """Seconds that an export takes in a process of its own, with the imports."""
    command = ["loopexport", "onnx", str(root), "--steps", steps, "--dtype", dtype, "--no-verify"]
    return run_process([sys.executable, "-m", *command]).seconds


def session_mib(root: Path, file: str, provider: str) -> float:
    """Memory of a session with its weights, in a process of its own."""
    command = [sys.executable, "-c", MEMORY, str(root), file, provider]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def onnx_timer(model: OnnxModel, tokens: np.ndarray, cache):
    """A function that takes the seconds of one forward."""

    def timed() -> float:
        start = time.perf_counter()
        model.forward(tokens, cache=cache)
        return time.perf_counter() - start

    return timed


def torch_timer(model, tokens: torch.Tensor, past: torch.Tensor | None):
    """The same in torch; the cache is made anew each time, outside of what is timed."""

    @torch.no_grad()
    def timed() -> float:
        cache = model(past, use_cache=True).past_key_values if past is not None else None
        synchronise(model)
        start = time.perf_counter()
        model(tokens, past_key_values=cache, use_cache=True)
        synchronise(model)
        return time.perf_counter() - start

    return timed


def synchronise(model) -> None:
    """Wait for the GPU."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def timings(root: Path, files: dict[int, str], options) -> dict[str, dict[str, list[float]]]:
    """Seconds of prefill and of a decode step, for both K and for torch with the larger one."""
    past = np.random.default_rng(0).integers(3, 100, size=(1, options.past))
    token = past[:, :1]
    models = {k: OnnxModel(root, file, provider=options.provider, threads=options.threads) for k, file in files.items()}
    caches = {k: model.forward(past)[1] for k, model in models.items()}
    reference = AutoModelForCausalLM.from_pretrained(
        root, trust_remote_code=True, dtype=TORCH_DTYPES[options.dtype], loop_steps=MANY
    ).eval()
    reference = reference.to("cuda" if models[1].provider == "cuda" else "cpu")
    on_device = {name: torch.from_numpy(each).to(reference.device) for name, each in (("past", past), ("one", token))}
    prefill = {f"onnx K={k}": onnx_timer(model, past, None) for k, model in models.items()}
    decode = {f"onnx K={k}": onnx_timer(model, token, caches[k]) for k, model in models.items()}
    prefill[f"torch K={MANY}"] = torch_timer(reference, on_device["past"], None)
    decode[f"torch K={MANY}"] = torch_timer(reference, on_device["one"], on_device["past"])
    return {"prefill": interleaved(prefill, options.rounds), "decode": interleaved(decode, options.rounds)}


def parse():
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--span", default="13:17")
    parser.add_argument("--provider", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=TORCH_DTYPES)
    parser.add_argument("--past", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    """Measure all, print a JSON object."""
    options = parse()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=Path(options.model).parent) as temporary:
        root = Path(temporary) / "looped"
        looped = loopexport.convert(options.model, root, span=options.span, steps=MANY, weights="hardlink")
        seconds = {k: export(root, str(k), options.dtype) for k in (1, MANY)}
        suffix = "" if (root / "model.onnx").exists() else options.dtype
        files = {k: graph_name(k, MANY, suffix) for k in (1, MANY)}
        data = root / data_name(options.dtype)
        mib = {k: session_mib(root, file, options.provider) for k, file in files.items()}
        measured = timings(root, files, options)
        evaluations = looped.cost.multiplier
        decode, prefill = measured["decode"], measured["prefill"]
        one, many, reference = "onnx K=1", f"onnx K={MANY}", f"torch K={MANY}"
        result = {
            "export seconds": seconds,
            "export time, K=6 / K=1 (limit 1.2)": seconds[MANY] / seconds[1],
            "weight bytes written": data.stat().st_size if data.exists() else 0,
            "graph bytes": {k: (root / file).stat().st_size for k, file in files.items()},
            "session MiB": mib,
            "session memory, K=6 / K=1 (limit 1.05)": mib[MANY] / mib[1],
            "median ms": {
                kind: {name: round(1000 * float(np.median(each)), 2) for name, each in group.items()}
                for kind, group in measured.items()
            },
            "evaluations, K=6 / K=1": evaluations,
            "decode, K=6 / (K=1 x evaluations) (limit 1.05)": ratio(decode[many], decode[one]) / evaluations,
            "decode, torch / onnx (at least 2)": ratio(decode[reference], decode[many]),
            "prefill, torch / onnx (at least 1)": ratio(prefill[reference], prefill[many]),
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
