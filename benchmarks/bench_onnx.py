"""Compare ONNX graphs of K = 1 and K = 6 with each other and with torch: exactness, export time, memory, speed.

    python benchmarks/bench_onnx.py MODEL [--span 13:17] [--provider cuda] [--dtype fp16 bf16] [--attention gqa] [...]

Defaults: fp32 on the CPU, fp16 and bf16 on CUDA; both attention layouts. The export itself first compares each graph
with torch. Each engine runs alone in a process, the processes take turns, and all ratios come from one run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import ratio, run_process

import loopexport
from loopexport.export.onnx_files import data_name

MANY = 6
ENGINE = Path(__file__).with_name("onnx_engine.py")
DEFAULT_DTYPES = {"cpu": ["fp32"], "cuda": ["fp16", "bf16"]}


def export(root: Path, steps: str, dtype: str, attention: str, *more: str) -> float:
    """Seconds for an export in a process of its own, imports included."""
    command = ["loopexport", "onnx", str(root), "--steps", steps, "--dtype", dtype, "--attention", attention, *more]
    return run_process([sys.executable, "-m", *command]).seconds


def run_engine(engine: str, root: Path, options, *more: str) -> dict:
    """Run `onnx_engine.py` once; each figure is the median of its rounds."""
    command = [sys.executable, str(ENGINE), engine, str(root), "--provider", options.provider, *more]
    command += ["--past", str(options.past), "--threads", str(options.threads)]
    measured = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return {name: each if name == "mib" else statistics.median(each) for name, each in measured.items()}


def in_turn(engines: dict[str, tuple], root: Path, options) -> dict[str, dict[str, list[float]]]:
    """Run the engines in turn; the values of all rounds, by figure and engine."""
    rounds = [
        {name: run_engine(kind, root, options, *more) for name, (kind, *more) in engines.items()}
        for _ in range(options.rounds)
    ]
    figures = ("mib", "decode", "prefill")
    return {each: {name: [one[name][each] for one in rounds] for name in engines} for each in figures}


def bytes_per_second(provider: str) -> float:
    """Memory bandwidth of the device for reading: the best of several sums over half a GiB."""
    import torch

    device = "cuda" if provider == "cuda" else "cpu"
    numbers = torch.ones(2**27, dtype=torch.float32, device=device)
    taken = []
    for _ in range(8):
        start = time.perf_counter()
        float(numbers.sum())
        taken.append(time.perf_counter() - start)
    return numbers.nbytes / min(taken)


def compare(looped, dtype: str, attention: str, options) -> dict:
    """Measure one dtype and attention layout."""
    root = looped.root
    seconds = {k: export(root, str(k), dtype, attention, "--no-verify") for k in (1, MANY)}
    export(root, f"1,{MANY}", dtype, attention)  # raises if a graph differs from torch
    records = loopexport.open_export(root).manifest.onnx
    graphs = {
        record.steps: name
        for name, record in records.items()
        if name.endswith(".onnx") and (record.dtype, record.attention) == (dtype, attention)
    }
    one, many, torch = "onnx K=1", f"onnx K={MANY}", f"torch K={MANY}"
    engines = {
        one: ("onnx", "--file", graphs[1]),
        many: ("onnx", "--file", graphs[MANY]),
        torch: ("torch", "--steps", str(MANY), "--dtype", dtype),
    }
    measured = in_turn(engines, root, options)
    data, evaluations = root / data_name(dtype), looped.cost.multiplier
    decode, prefill, mib = measured["decode"], measured["prefill"], measured["mib"]
    itemsize = 4 if dtype == "fp32" else 2
    ideal = bytes_per_second(options.provider) / (looped.cost.params_read * itemsize)
    return {
        "graphs": {
            name: {
                "largest difference from torch": records[name].difference,
                "bytes": (root / name).stat().st_size,
                "export seconds": round(seconds[k], 1),
            }
            for k, name in graphs.items()
        },
        "export time, K=6 / K=1 (limit 1.2)": seconds[MANY] / seconds[1],
        "weight bytes written": data.stat().st_size if data.exists() else 0,
        "session MiB": {name: round(statistics.median(each)) for name, each in mib.items()},
        "session memory, K=6 / K=1 (limit 1.05)": ratio(mib[many], mib[one]),
        "median ms": {
            kind: {name: round(1000 * statistics.median(each), 2) for name, each in measured[kind].items()}
            for kind in ("prefill", "decode")
        },
        "evaluations, K=6 / K=1": evaluations,
        "decode, K=6 / (K=1 x evaluations) (limit 1.05)": ratio(decode[many], decode[one]) / evaluations,
        "decode, torch / onnx (at least 2)": ratio(decode[torch], decode[many]),
        "prefill, torch / onnx (at least 1)": ratio(prefill[torch], prefill[many]),
        "tokens per second": 1 / statistics.median(decode[many]),
        "tokens per second that memory bandwidth allows": ideal,
    }


def parse():
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--span", default="13:17")
    parser.add_argument("--provider", default="cpu", choices=DEFAULT_DTYPES)
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "fp16", "bf16"])
    parser.add_argument("--attention", nargs="+", default=["portable", "gqa"], choices=["portable", "gqa"])
    parser.add_argument("--past", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    """Measure everything and print a JSON object."""
    options = parse()
    with tempfile.TemporaryDirectory(dir=Path(options.model).parent) as temporary:
        root = Path(temporary) / "looped"
        looped = loopexport.convert(options.model, root, span=options.span, steps=MANY, weights="hardlink")
        result = {
            f"{dtype} {attention}": compare(looped, dtype, attention, options)
            for dtype in options.dtype or DEFAULT_DTYPES[options.provider]
            for attention in options.attention
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
