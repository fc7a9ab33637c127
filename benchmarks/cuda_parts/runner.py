"""Run parts one after the other, each in a process of its own with its own time limit, and pass their results on."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .results import MAX_ERROR_CHARS, Result, failure, skipped
from .scale import Scale

# Less time than this is not worth starting a process for.
LEAST_SECONDS = 10.0
GOOD = {"passed", "measured", "skipped"}


@dataclass(frozen=True)
class Part:
    """A part of the benchmark.

    Attributes:
        name: as `--parts` takes it.
        seconds: its time limit.
        proves: whether it compares; if so, anything but "passed" and "skipped" is a failure of the whole run.
        cases: makes the generator of its results; imports what it needs.
    """

    name: str
    seconds: float
    proves: bool
    cases: Callable[[Scale], Iterator[Result]]


def run_here(part: Part, scale: Scale) -> None:
    """Run a part in this process and print its results."""
    try:
        for result in part.cases(scale):
            print(json.dumps(result), flush=True)
    except Exception as error:  # its other results are printed already
        print(json.dumps(failure(error)), flush=True)


def run_apart(part: Part, command: list[str], seconds: float) -> Iterator[Result]:
    """Run a part in a process and pass on its results as they come.

    Args:
        part: the part.
        command: the process; it prints a line of JSON for each result.
        seconds: its time limit.
    """
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1, start_new_session=True
        )
        deadline = time.monotonic() + seconds
        try:
            for line in _lines(process, deadline):
                if line.startswith("{"):
                    yield {"part": part.name, **json.loads(line)}
            status = process.wait(max(0.1, deadline - time.monotonic()))
            if status:
                yield {"part": part.name, "status": "error", "error": f"exit status {status}: {_end_of(errors)}"}
        except (TimeoutError, subprocess.TimeoutExpired):
            yield {"part": part.name, "status": "timeout", "error": f"took more than {seconds:.0f} s"}
        finally:
            _stop(process)


def _lines(process: subprocess.Popen, deadline: float) -> Iterator[str]:
    """The lines of a process's output; TimeoutError at the deadline."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        rest = b""
        while True:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            data = os.read(process.stdout.fileno(), 65536)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            yield from (line.decode() for line in lines)


def _end_of(file) -> str:
    file.seek(0)
    return " ".join(file.read().split())[-MAX_ERROR_CHARS:]


def _stop(process: subprocess.Popen) -> None:
    """End a process and those that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def run_all(parts: list[Part], command: Callable[[Part], list[str]], seconds: float) -> Iterator[Result]:
    """Run parts in turn within a time limit for all of them; a part that gets no time is skipped."""
    deadline = time.monotonic() + seconds
    for part in parts:
        left = deadline - time.monotonic()
        if left < min(LEAST_SECONDS, part.seconds):
            yield {"part": part.name, **skipped(f"no time left of {seconds:.0f} s; choose it with --parts")}
            continue
        yield from run_apart(part, command(part), min(part.seconds, left))


def is_failure(result: Result, parts: list[Part]) -> bool:
    """Whether a result makes the whole run fail."""
    return result["status"] not in GOOD and any(part.proves and part.name == result["part"] for part in parts)


def table(results: list[Result]) -> str:
    """A line for each part: how many cases ended how."""
    counts: dict[str, Counter] = {}
    for result in results:
        counts.setdefault(result["part"], Counter())[result["status"]] += 1
    width = max(map(len, counts), default=0)
    return "\n".join(
        f"{name:{width}}  " + ", ".join(f"{count} {status}" for status, count in each.items())
        for name, each in counts.items()
    )
