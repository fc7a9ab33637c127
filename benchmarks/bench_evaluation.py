"""Time and memory of `compare` and `scan`, as ratios within one run.

- compare against lm-evaluation-harness alone, which evaluates base and loop one after the other;
- a scan of 50 loops against 50 comparisons of one loop each, loading not counted; every tenth comparison is run, and
  their time scaled;
- the peak memory of the scan against that of the base alone on the same items, each in a process of its own.

    python benchmarks/bench_evaluation.py MODEL [ITEMS.jsonl]
"""

from __future__ import annotations

import os

os.environ["TQDM_DISABLE"] = "1"

import sys
import time
from contextlib import contextmanager
from pathlib import Path

from measure import interleaved, ratio, run_process

from loopexport import plan_scan
from loopexport.evaluation.arms import Arm, Model, base_arm
from loopexport.evaluation.journal import Journal
from loopexport.evaluation.measurement import Measurement
from loopexport.evaluation.prefix import SharedPrefix
from loopexport.evaluation.tasks import Prompting, TaskSource

ITEMS = Path(__file__).parent.parent / "examples" / "items" / "arithmetic.jsonl"
LIMIT, ROUNDS, EVERY = 12, 3, 10
GRID = {"widths": (2, 4), "stride": 2, "steps": (2, 3)}
CELLS = 50


class Bench:
    """A base with the loops of a scan, loaded once.

    Args:
        base: the base.
        items: a file of items with choices.
    """

    def __init__(self, base: Path, items: Path):
        self.plan = plan_scan(base, items=items, limit=LIMIT, max_evaluations=CELLS, dtype="float32", **GRID)
        self.source = TaskSource(items=items)
        self.arms = [Arm(cell.name, cell.spec) for cell in self.plan.cells]

    @contextmanager
    def loaded(self):
        """Load the model until the end of the block."""
        with self.plan.compare.subject.directory() as root:
            self.model = Model(root, "hf", self.plan.compare.engine, self.plan.compare.batch_size)
            self.model.use(base_arm(self.arms[0].spec))
            yield

    def compare(self, arms: list[Arm], prefix: SharedPrefix | None = None) -> float:
        """Seconds in which the base and these loops answer all items."""
        self.model.prefix = prefix
        start = time.perf_counter()
        measurement = Measurement(self.model, Journal(None), self.source.load(), Prompting(limit=LIMIT))
        measurement.pairs(base_arm(arms[0].spec), arms, (1234,))
        return time.perf_counter() - start

    def harness(self, arms: list[Arm]) -> float:
        """Seconds of lm-evaluation-harness alone, for the base and one loop."""
        from lm_eval.evaluator import evaluate

        start = time.perf_counter()
        for arm in (base_arm(self.arms[0].spec), *arms):
            evaluate(lm=self.model.use(arm), task_dict=self.source.load(), limit=LIMIT, bootstrap_iters=0)
        return time.perf_counter() - start

    def scan(self) -> tuple[float, SharedPrefix]:
        """Seconds in which the base and all loops answer all items, and what they shared."""
        prefix = SharedPrefix()
        return self.compare(self.arms, prefix), prefix


def main(base: Path, items: Path) -> None:
    """Measure and print the ratios."""
    bench = Bench(base, items)
    with bench.loaded():
        one = bench.arms[len(bench.arms) // 2 :][:1]
        seconds = interleaved({"ours": lambda: bench.compare(one), "harness": lambda: bench.harness(one)}, ROUNDS)
        print(f"{base.name}: {LIMIT} items of {items.name}, batches of {bench.model.batch_size}")
        print(f"compare: {ratio(seconds['ours'], seconds['harness']):.3f}x the time of lm-evaluation-harness alone")
        together, prefix = bench.scan()
        apart = sum(bench.compare([arm]) for arm in bench.arms[::EVERY]) * EVERY
        shared = f"{100 * prefix.saved / prefix.evaluations:.0f} % of the layer evaluations shared"
        print(f"scan of {len(bench.arms)} loops: {together / apart:.3f}x as many comparisons; {shared} {prefix.off}")
    peaks = {
        name: run_process([sys.executable, __file__, str(base), str(items), name]).peak_mib for name in ("base", "scan")
    }
    print(f"peak memory of the scan: {peaks['scan'] / peaks['base']:.3f}x the base's, {peaks['base']:.0f} MiB")


def run_once(base: Path, items: Path, name: str) -> None:
    """Run the base alone, or the whole scan, for a measurement of memory."""
    bench = Bench(base, items)
    with bench.loaded():
        if name == "scan":
            bench.scan()
        else:
            bench.harness([])


if __name__ == "__main__":
    model, items, part = (*sys.argv[1:], *("", str(ITEMS), "")[len(sys.argv) - 1 :])
    if part:
        run_once(Path(model), Path(items), part)
    else:
        main(Path(model), Path(items))
