"""Speed in MLX: an export's loops against its base.

    python benchmarks/bench_mlx.py EXPORT [--loops shared:3,per_step:3] [--prompt 128] [--new 32] [--rounds 7]

Needs mlx-lm, not LoopExport. All models share one process and take turns; each figure is the median over rounds of the
ratio within a round. Prints a JSON object: for each loop, its time / (the base's time x the ratio of layer
evaluations), where 1 is ideal, for a prompt and for decode steps. The ratio counts decoder layers alone: embedding and
head, which run once, make it less than 1 for a small model. The base is the export itself with K = 1. "base again" is a
second copy of it: its distance from 1 is the noise. On CPUs it computes in fp32, since MLX is slow there in bf16, and
the clock is the CPU time of the process, since other processes disturb the wall time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path


def load(directory: str, **fields):
    """The model of an export with these loop fields."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model = load_model(Path(directory), model_config=fields, trust_remote_code=True)[0]
    if mx.default_device() == mx.cpu:
        model.set_dtype(mx.float32)
    return model


def now() -> float:
    """The time in seconds."""
    import mlx.core as mx

    return time.process_time() if mx.default_device() == mx.cpu else time.perf_counter()


def measure(model, prompt: int, new: int) -> dict[str, float]:
    """Seconds for a prompt, and for decode steps after it."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    start = now()
    mx.eval(model(mx.array([[3 + number % 90 for number in range(prompt)]]), cache=cache))
    middle = now()
    token = mx.array([[3]])
    for _ in range(new):
        token = model(token, cache=cache)[:, -1].argmax(-1)[None]
        mx.eval(token)
    return {"prompt": middle - start, "decode": now() - middle}


def overheads(times: list[dict], base: list[dict], evaluations: float) -> dict[str, float]:
    """The median over rounds of time / (base time x evaluations)."""
    return {
        kind: round(
            statistics.median(ours[kind] / theirs[kind] for ours, theirs in zip(times, base, strict=True))
            / evaluations,
            3,
        )
        for kind in base[0]
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("export")
    parser.add_argument("--loops", default="shared:3,per_step:3", help="policy and K, separated by commas")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=16, help="decode steps")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    loops = [tuple(each.split(":")) for each in options.loops.split(",")]
    models = {"base": load(options.export, loop_steps=1), "base again": load(options.export, loop_steps=1)}
    for kv, steps in loops:
        models[f"{kv}:{steps}"] = load(options.export, loop_kv=kv, loop_steps=int(steps))
    rounds = [
        {name: measure(model, options.prompt, options.new) for name, model in models.items()}
        for _ in range(options.rounds + 1)
    ][1:]  # the first one compiles kernels and touches the weights
    base = [each["base"] for each in rounds]
    results: dict = {"base again": overheads([each["base again"] for each in rounds], base, 1)}
    for kv, steps in loops:
        times = [each[f"{kv}:{steps}"] for each in rounds]
        results[f"{kv}:{steps}"] = overheads(times, base, _evaluations(options.export, int(steps)))
    print(json.dumps(results, indent=2))


def _evaluations(export: str, steps: int) -> float:
    """Layer evaluations of a loop in proportion to those of the base."""
    config = json.loads((Path(export) / "config.json").read_text())
    spans = config["loop_span"] if isinstance(config["loop_span"][0], list) else [config["loop_span"]]
    looped = sum(stop - start for start, stop in spans)
    return 1 + (steps - 1) * looped / config["num_hidden_layers"]


if __name__ == "__main__":
    main()
