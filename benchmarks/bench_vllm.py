"""Tokens per second of an export on vLLM, compared with its own base (K = 1) and with the ratio of layer evaluations.

    python benchmarks/bench_vllm.py EXPORT [--prompts 8] [--new 64] [--rounds 3] [--tensor-parallel-size 1] [--eager]

Needs vLLM, not LoopExport. Each engine runs alone in a process, and the processes take turns. On a GPU they use CUDA
graphs unless you give --eager. Prints a JSON object; all ratios come from one run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from measure import ratio

PROMPT_TOKENS = 64


def tokens_per_second(options) -> float:
    """New tokens per second of one engine, all prompts at once, after one uncounted round."""
    import vllm

    engine = vllm.LLM(
        model=options.export,
        hf_overrides={"loop_steps": options.steps},
        trust_remote_code=True,
        skip_tokenizer_init=True,
        dtype=options.dtype,
        max_model_len=PROMPT_TOKENS + options.new,
        enforce_eager=options.eager,
        tensor_parallel_size=options.tensor_parallel_size,
        enable_prefix_caching=False,
    )
    prompts = [{"prompt_token_ids": [3 + number] * PROMPT_TOKENS} for number in range(options.prompts)]
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=options.new, ignore_eos=True, detokenize=False)
    taken = 0.0
    for _ in range(2):
        start = time.perf_counter()
        engine.generate(prompts, sampling, use_tqdm=False)
        taken = time.perf_counter() - start
    return options.prompts * options.new / taken


def evaluations(export: str) -> float:
    """Layer evaluations per token, looped / base, for a rule that runs the span once in each step."""
    config = json.loads((Path(export) / "config.json").read_text())
    span = config["loop_span"]
    spans = span if isinstance(span[0], list) else [span]
    looped = sum(stop - start for start, stop in spans)
    return 1 + (config["loop_steps"] - 1) * looped / config["num_hidden_layers"]


def in_process(steps: int) -> float:
    """Tokens per second of one engine in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--steps", str(steps)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(output.splitlines()[-1])


def parse():
    """Parse the command line; --steps is only for the processes that this script starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure and print the results."""
    options = parse()
    if options.steps:
        print(tokens_per_second(options))
        return
    config = json.loads((Path(options.export) / "config.json").read_text())
    rounds = [(in_process(1), in_process(config["loop_steps"])) for _ in range(options.rounds)]
    base, looped = ([each[side] for each in rounds] for side in (0, 1))
    slower = ratio(base, looped)
    result = {
        "tokens per second, base": statistics.median(base),
        f"tokens per second, K={config['loop_steps']}": statistics.median(looped),
        "base / looped": slower,
        "layer evaluations, looped / base": evaluations(options.export),
        "base / looped, over layer evaluations (1 is ideal)": slower / evaluations(options.export),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
