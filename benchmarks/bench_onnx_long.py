"""Long prompts in ONNX Runtime against torch (sdpa): peak memory, time of the prompt, and time of a later token.

    python benchmarks/bench_onnx_long.py MODEL [--span 11:16] [--steps 4] [--tokens 128 512 4096] [--rounds 3]

Each run has a process of its own. The engines take turns, and all ratios come from one run. Prints a JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import ratio

import loopexport
from loopexport.onnx import plan_onnx

ENGINE = Path(__file__).with_name("prompt_engine.py")
LAYOUTS = ("portable", "gqa")
FIGURES = ("peak_mib", "prompt", "token")

# For each figure, engine and number of tokens, the values of all rounds.
Values = dict[str, dict[tuple[str, int], list[float]]]


def run_engine(engine: str, root: Path, file: str | None, tokens: int, options) -> dict[str, float]:
    """Run `prompt_engine.py` once."""
    command = [sys.executable, str(ENGINE), engine, str(root), "--tokens", str(tokens), "--new", str(options.new)]
    command += ["--threads", str(options.threads), *(["--file", file] if file else [])]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(root: Path, files: dict[str, str | None], options) -> Values:
    """Run all engines on all prompts in turn."""
    values: Values = {figure: {} for figure in FIGURES}
    for _ in range(options.rounds):
        for tokens in options.tokens:
            for name, file in files.items():
                found = run_engine("onnx" if file else "torch", root, file, tokens, options)
                for figure in FIGURES:
                    values[figure].setdefault((name, tokens), []).append(found[figure])
    return values


def summary(values: Values, layout: str, tokens: list[int]) -> dict[str, float]:
    """The ratios of one layout to torch; the later token is compared between the longest and the shortest prompt."""
    least, most = min(tokens), max(tokens)
    result = {}
    for each in tokens[1:]:
        ours, theirs = (layout, each), ("torch", each)
        result[f"peak memory, {each} tokens, onnx / torch (limit 1.15)"] = ratio(
            values["peak_mib"][ours], values["peak_mib"][theirs]
        )
        result[f"prompt of {each} tokens, onnx / torch (limit 1)"] = ratio(
            values["prompt"][ours], values["prompt"][theirs]
        )
    grows = {
        name: [
            long / short for long, short in zip(values["token"][name, most], values["token"][name, least], strict=True)
        ]
        for name in (layout, "torch")
    }
    result[f"a token after {most} / after {least}"] = statistics.median(grows[layout])
    result[f"the same in torch (limit of onnx) after {most} / after {least}"] = statistics.median(grows["torch"])
    return result


def medians(values: Values) -> dict[str, dict[str, float]]:
    """All figures: MiB and seconds."""
    return {
        figure: {
            f"{name}, {tokens} tokens": round(statistics.median(each), 4) for (name, tokens), each in found.items()
        }
        for figure, found in values.items()
    }


def parse():
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--span", default="11:16")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512, 4096])
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--attention", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    return parser.parse_args()


def main() -> None:
    """Measure everything and print a JSON object."""
    options = parse()
    tokens = options.tokens = sorted(options.tokens)
    with tempfile.TemporaryDirectory(dir=Path(options.model).parent) as temporary:
        made = loopexport.convert(
            options.model, Path(temporary) / "looped", span=options.span, steps=options.steps, weights="hardlink"
        )
        files: dict[str, str | None] = {}
        for layout in options.attention:
            plan = plan_onnx(made.root, dtype="fp32", attention=layout)
            plan.apply(verify=False)
            (files[layout],) = plan.graphs
        values = measure(made.root, {**files, "torch": None}, options)
    result = {layout: summary(values, layout, tokens) for layout in files}
    print(json.dumps({**result, "medians": medians(values)}, indent=2))


if __name__ == "__main__":
    main()
