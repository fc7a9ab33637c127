"""int4 and int8 graphs against fp32, and K = 6 against K = 1: bytes, memory, decode and prefill on the CPU.

    python benchmarks/bench_onnx_quantised.py MODEL [--span 11:16] [--past 128] [--rounds 5] [--threads 1]

Each engine runs alone in a process, the processes take turns, and all ratios come from one run. Prints a JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from bench_onnx import MANY, in_turn
from measure import ratio

import loopexport
from loopexport.onnx import plan_onnx

DTYPES = ("fp32", "int4", "int8")


def data_bytes(root: Path) -> int:
    """Bytes of all data files."""
    return sum(path.stat().st_size for path in root.glob("*.onnx_data"))


def export(root: Path, dtype: str, options) -> tuple[dict[int, str], float]:
    """The graphs of K = 1 and K = 6 by K, and the bytes of data after both / after the first."""
    before = data_bytes(root)
    names, sizes = {}, []
    more: dict[str, Any] = {"quantise_head": options.quantise_head} if dtype != "fp32" else {}
    for steps in (1, MANY):
        plan = plan_onnx(root, steps=(steps,), dtype=dtype, attention=options.attention, **more)
        plan.apply(verify=False)
        (names[steps],) = plan.graphs
        sizes.append(data_bytes(root) - before)
    return names, sizes[1] / sizes[0] if sizes[0] else 1.0  # fp32 graphs of an fp32 checkpoint write no data


def compare(measured: dict, dtype: str) -> dict[str, float]:
    """The ratios of one dtype, to fp32 and between both K."""
    mib, decode, prefill = measured["mib"], measured["decode"], measured["prefill"]
    one, many = f"{dtype} K=1", f"{dtype} K={MANY}"
    result = {f"session memory, K={MANY} / K=1 (limit 1.05)": ratio(mib[many], mib[one])}
    if dtype == "fp32":
        return result
    for name, steps in ((one, 1), (many, MANY)):
        plain = f"fp32 K={steps}"
        result |= {
            f"session memory, K={steps}, {dtype} / fp32": ratio(mib[name], mib[plain]),
            f"decode, K={steps}, fp32 / {dtype}": ratio(decode[plain], decode[name]),
            f"prefill, K={steps}, {dtype} / fp32 (limit 1.15)": ratio(prefill[name], prefill[plain]),
        }
    return result


def parse():
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--span", default="11:16")
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES[1:]), choices=DTYPES[1:])
    parser.add_argument("--quantise-head", action="store_true")
    parser.add_argument("--attention", default="portable", choices=["portable", "gqa"])
    parser.add_argument("--past", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.set_defaults(provider="cpu")
    return parser.parse_args()


def main() -> None:
    """Measure everything and print a JSON object."""
    options = parse()
    chosen = ["fp32", *options.dtype]
    with tempfile.TemporaryDirectory(dir=Path(options.model).parent) as temporary:
        root = Path(temporary) / "looped"
        loopexport.convert(options.model, root, span=options.span, steps=MANY, weights="hardlink")
        exported = {dtype: export(root, dtype, options) for dtype in chosen}
        engines = {
            f"{dtype} K={steps}": ("onnx", "--file", file)
            for dtype, (names, _) in exported.items()
            for steps, file in names.items()
        }
        measured = in_turn(engines, root, options)
    result = {
        dtype: {f"data bytes, K={MANY} / K=1 (limit 1)": exported[dtype][1], **compare(measured, dtype)}
        for dtype in chosen
    }
    medians = {
        figure: {name: round(statistics.median(each), 5) for name, each in found.items()}
        for figure, found in measured.items()
    }
    print(json.dumps({**result, "medians": medians}, indent=2))


if __name__ == "__main__":
    main()
