"""Speed on vLLM: an export's loops against its base, and vLLM's own class of the base against its Transformers backend.

    python benchmarks/bench_vllm.py [EXPORT] [--loops shared:2,per_step:4] [--native BASE] [--eager] [--tiny]

Needs vLLM, not LoopExport. All engines live in one process and take turns; each figure is the median over rounds of the
ratio within a round. On CPUs the clock is the CPU time of the process, since other processes disturb the wall time.
Prints a JSON object. For each loop, "overhead" is its time / (the base's time x the ratio of layer evaluations), where
1 is ideal. The base is the export itself with K = 1. "base again" is a second engine of the same: its distance from 1
is the noise. --native adds the time of the Transformers backend divided by that of vLLM's own class, both on BASE, the
directory of the base.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from measure import interleaved, ratio

# For vLLM's import: engines in this process, a K/V cache of 1 GiB for each on CPUs, no log on stdout.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


class Load(NamedTuple):
    """What an engine is asked: requests, tokens of each prompt, new tokens of each answer."""

    requests: int
    prompt: int
    new: int


LOADS = {"prompt": Load(1, 512, 1), "one request": Load(1, 16, 32), "64 requests": Load(64, 32, 16)}
TINY = {name: Load(min(load.requests, 4), 16, min(load.new, 4)) for name, load in LOADS.items()}


def make_engine(directory: str, options, **arguments):
    """An engine without a prefix cache, which would answer all rounds but the first."""
    import vllm

    return vllm.LLM(
        model=directory,
        trust_remote_code=True,
        skip_tokenizer_init=True,
        dtype=options.dtype,
        max_model_len=1024,
        max_num_seqs=64,
        enforce_eager=options.eager,
        gpu_memory_utilization=options.gpu_memory_utilization,
        enable_prefix_caching=False,
        **arguments,
    )


def clock():
    """The function that tells the time: the CPU time of the process, or on a GPU the wall time."""
    import torch

    return time.perf_counter if torch.cuda.is_available() else time.process_time


def answer(engine, load: Load) -> float:
    """Seconds in which an engine answers greedily."""
    import vllm

    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=load.new, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": [3 + number] * load.prompt} for number in range(load.requests)]
    now = clock()
    start = now()
    engine.generate(prompts, sampling, use_tqdm=False)
    return now() - start


def measure(directory: str, options, arguments: dict[str, dict]) -> dict[str, dict[str, list[float]]]:
    """The seconds of each engine in each round, for each load.

    The first engine of a process answers one request up to a fifth slower than a second one of the same, so one more
    comes first, and is not used.

    Args:
        arguments: those of each engine, by its name.
    """
    loads = TINY if options.tiny else LOADS
    made = {"first": next(iter(arguments.values())), **arguments}
    engines = {name: make_engine(directory, options, **given) for name, given in made.items()}
    return {
        name: interleaved({each: partial(answer, engine, load) for each, engine in engines.items()}, options.rounds)
        for name, load in loads.items()
    }


def evaluations(config: dict, steps: int) -> float:
    """Layer evaluations per token, looped / base, for a rule that runs the span once in each step."""
    span = config["loop_span"]
    spans = span if isinstance(span[0], list) else [span]
    return 1 + (steps - 1) * sum(stop - start for start, stop in spans) / config["num_hidden_layers"]


def loops(options) -> dict:
    """For each loop, its overhead under each load."""
    config = json.loads((Path(options.export) / "config.json").read_text())
    chosen = [name.split(":") for name in options.loops.split(",")]
    loop_of = {"base": {"loop_steps": 1}}
    loop_of |= {f"{kv} K={steps}": {"loop_kv": kv, "loop_steps": int(steps)} for kv, steps in chosen}
    loop_of["base again"] = loop_of["base"]
    seconds = measure(options.export, options, {name: {"hf_overrides": loop} for name, loop in loop_of.items()})
    return {
        name: {
            load: ratio(each[name], each["base"]) / evaluations(config, loop["loop_steps"])
            for load, each in seconds.items()
        }
        for name, loop in loop_of.items()
        if name != "base"
    }


def backends(options) -> dict:
    """The time of the Transformers backend / that of vLLM's own class, on the base, under each load."""
    seconds = measure(options.native, options, {name: {"model_impl": name} for name in ("transformers", "vllm")})
    return {load: ratio(each["transformers"], each["vllm"]) for load, each in seconds.items()}


def parse():
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", nargs="?")
    parser.add_argument("--loops", default="shared:2,shared:4,per_step:2,per_step:4")
    parser.add_argument("--native", metavar="BASE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.15, help="for each engine")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="few short requests, to see that it runs")
    return parser.parse_args()


def main() -> None:
    """Measure and print the results."""
    options = parse()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    result = {"overhead": loops(options)} if options.export else {}
    if options.native:
        result["transformers backend / own class"] = backends(options)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
