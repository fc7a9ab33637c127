"""Run commands in turn and compare them within one run, since machines drift."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Process:
    """What one process took: wall seconds and the largest resident size in MiB."""

    seconds: float
    peak_mib: float


def run_process(command: list[str]) -> Process:
    """Run a command to its end, its output thrown away.

    Raises:
        RuntimeError: it failed.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command} exited with {process.returncode}")
    return Process(seconds, usage.ru_maxrss / 1024)


def interleaved(actions: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each action, taken in turn for `rounds` rounds after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 1):
        for name, action in actions.items():
            taken = action()
            if number:
                seconds[name].append(taken)
    return seconds


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """The median of the ratios, round by round."""
    return statistics.median(one / other for one, other in zip(numerator, denominator, strict=True))
