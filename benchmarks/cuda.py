"""Everything about CUDA in one command: exactness, speed and memory of looped models in torch and ONNX Runtime.

    python benchmarks/cuda.py [--parts torch,onnx] [--out results.jsonl] [--minutes 7.5] [--rehearse]

Downloads nothing: the models have random weights, made on the GPU. Prints a line of JSON for each case as soon as it is
known, and a table at the end. Each part runs in a process of its own, with its own time limit; the most important parts
come first. The exit status is 1 if a part that compares did not pass. `--rehearse` runs all of it with tiny models on
the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from cuda_parts.checkout import use_checkout
from cuda_parts.results import Result
from cuda_parts.runner import Part, is_failure, run_all, run_here, table
from cuda_parts.scale import GPU, REHEARSAL, Scale


def _machine(scale: Scale) -> Iterator[Result]:
    from cuda_parts.machine import describe

    return describe(scale)


def _torch(scale: Scale) -> Iterator[Result]:
    from cuda_parts.torch_exactness import exact_as_the_base

    return exact_as_the_base(scale)


def _shared_read(scale: Scale) -> Iterator[Result]:
    from cuda_parts.onnx_shared_read import shared_reads

    return shared_reads(scale)


def _onnx(scale: Scale) -> Iterator[Result]:
    from cuda_parts.onnx_exactness import exact_as_torch

    return exact_as_torch(scale)


def _graphs(scale: Scale) -> Iterator[Result]:
    from cuda_parts.torch_graphs import exact_on_static_caches

    return exact_on_static_caches(scale)


def _quantised(scale: Scale) -> Iterator[Result]:
    from cuda_parts.quantised import int4

    return int4(scale)


def _speed(name: str):
    def cases(scale: Scale) -> Iterator[Result]:
        from cuda_parts.speed import speed

        return speed(name, scale)

    return cases


SELF = [sys.executable, __file__]
PARTS = [
    Part("machine", 60, False, _machine),
    Part("torch", 70, True, _torch),
    Part("shared-read", 40, True, _shared_read),
    Part("onnx", 100, True, _onnx),
    Part("graphs", 90, True, _graphs),
    Part("speed-0.6b", 80, False, _speed("Qwen3-0.6B")),
    Part("speed-4b", 110, False, _speed("Qwen3-4B")),
    Part("int4", 60, True, _quantised),
    Part("speed-moe", 90, False, _speed("Moonlight-16B-A3B")),
]
NAMES = [part.name for part in PARTS]


def parse(arguments: list[str] | None = None):
    """Parse the command line; --run-part is only for the processes that this script starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(NAMES), help=f"some of {', '.join(NAMES)}")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file, too")
    parser.add_argument("--minutes", type=float, default=7.5, help="for everything (default 7.5)")
    parser.add_argument("--rehearse", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--run-part", choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    unknown = set(options.parts.split(",")) - set(NAMES)
    if unknown:
        parser.error(f"unknown part {sorted(unknown)[0]!r}; choose from {', '.join(NAMES)}")
    return options


def quiet() -> None:
    """Hide progress bars and warnings: the output is for a program."""
    import warnings

    from transformers.utils import logging

    warnings.filterwarnings("ignore")
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def main() -> int:
    """Run the chosen parts; the exit status."""
    # As the folder of a script it is on the path, where this file hides the packages cuda.bindings and cuda.pathfinder.
    sys.path[:] = [each for each in sys.path if Path(each).resolve() != Path(__file__).resolve().parent]
    options = parse()
    if options.run_part:
        use_checkout()
        quiet()
        (part,) = [part for part in PARTS if part.name == options.run_part]
        run_here(part, REHEARSAL if options.rehearse else GPU)
        return 0
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    patience = 10 if options.rehearse else 1
    chosen = [replace(part, seconds=patience * part.seconds) for part in PARTS if part.name in options.parts.split(",")]
    more = ["--rehearse"] if options.rehearse else []
    results = []
    for result in run_all(
        chosen, lambda part: [*SELF, "--run-part", part.name, *more], 60 * patience * options.minutes
    ):
        results.append(result)
        print(json.dumps(result), flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps(result) + "\n")
    print(table(results))
    return int(any(is_failure(result, PARTS) for result in results))


if __name__ == "__main__":
    sys.exit(main())
