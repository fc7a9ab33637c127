"""Cost of converting: time and memory on a 60 GB checkpoint of zeros, copying compared with `cp`, and start-up time.

python benchmarks/bench_convert.py [DIRECTORY]      DIRECTORY is where to work, by default a temporary directory
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

from measure import interleaved, ratio, run_process

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from loopexport.files.digests import file_sha256
from support.checkpoints import write_sparse_checkpoint

LOOPEXPORT = [sys.executable, "-m", "loopexport"]
SPEC = ["--span", "12:20", "--steps", "4"]
GIB = 2**30
COPY_BYTES = int(os.environ.get("COPY_GIB", 8)) * GIB


def convert(base: Path, out: Path, weights: str):
    """Convert once into a new directory."""
    shutil.rmtree(out, ignore_errors=True)
    return run_process([*LOOPEXPORT, "convert", str(base), str(out), *SPEC, "--weights", weights])


def bench_large(work: Path) -> None:
    """Convert a checkpoint of 13 shards of 4.6 GiB by hardlinks."""
    base = write_sparse_checkpoint(work / "large", shards=13, shard_bytes=46 * GIB // 10)
    size = sum(path.stat().st_size for path in base.iterdir())
    runs = [convert(base, work / "large-out", "hardlink") for _ in range(5)]
    seconds = statistics.median(run.seconds for run in runs)
    print(f"hardlink {size / GIB:.0f} GiB, 13 shards: {seconds:.2f} s, {max(run.peak_mib for run in runs):.0f} MiB")


def bench_copy(work: Path) -> None:
    """Compare `convert --weights copy` with `cp` of the same files, to the disk and into the page cache alone."""
    base = write_sparse_checkpoint(work / "base", shards=4, shard_bytes=COPY_BYTES // 4, layers_per_shard=5)
    for path in base.glob("*.safetensors"):
        _fill(path)
    size = sum(path.stat().st_size for path in base.iterdir())
    hub = _hub_cache_layout(base, work / "hub")
    commands = {
        "cp": ["cp", "-r", str(base), str(work / "out")],
        "convert": [*LOOPEXPORT, "convert", str(base), str(work / "out"), *SPEC, "--weights", "copy"],
        "convert from the Hub cache": [*LOOPEXPORT, "convert", str(hub), str(work / "out"), *SPEC, "--weights", "copy"],
    }
    for label, flush in (("to the disk", ["sync", "-f"]), ("into the page cache", None)):

        def run(command: list[str], flush=flush) -> float:
            shutil.rmtree(work / "out", ignore_errors=True)
            run_process(["sync", "-f", str(work)])
            seconds = run_process(command).seconds
            return seconds + (run_process([*flush, str(work)]).seconds if flush else 0)

        seconds = interleaved({name: partial(run, command) for name, command in commands.items()}, rounds=3)
        print(f"copy {size / GIB:.1f} GiB {label}: cp {statistics.median(seconds['cp']):.2f} s")
        for name in ("convert", "convert from the Hub cache"):
            print(
                f"    {name}: {statistics.median(seconds[name]):.2f} s, ratio {ratio(seconds[name], seconds['cp']):.2f}"
            )
    added = sum(path.stat().st_size for path in (work / "out").rglob("*") if path.is_file()) - size
    print(f"on disk: {added:,} bytes more than the base")


def bench_start(work: Path) -> None:
    """Time `loopexport --help`."""
    runs = [run_process([*LOOPEXPORT, "--help"]) for _ in range(15)]
    print(f"--help: {statistics.median(run.seconds for run in runs):.3f} s, {runs[0].peak_mib:.0f} MiB")


def _hub_cache_layout(base: Path, root: Path) -> Path:
    """Make links to blobs named by their sha256, the layout in which the Hub's cache keeps large files."""
    (root / "blobs").mkdir(parents=True)
    for path in base.iterdir():
        blob = root / "blobs" / file_sha256(path)
        os.link(path, blob)
        (root / path.name).symlink_to(blob)
    return root


def _fill(path: Path) -> None:
    """Fill the hole in a sparse file with data; copying a hole costs nothing."""
    block = os.urandom(2**20)
    with path.open("r+b") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        file.seek(start)
        left = path.stat().st_size - start
        while left > 0:
            left -= file.write(block[:left])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as directory:
        for bench in (bench_start, bench_large, bench_copy):
            bench(Path(directory))
