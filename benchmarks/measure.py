"""Time processes and functions in turn, and compare them within one run: a machine's speed drifts between runs."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Process:
    """The cost of one process.

    Attributes:
        seconds: wall time.
        peak_mib: largest resident size in MiB.
    """

    seconds: float
    peak_mib: float


def run_process(command: list[str]) -> Process:
    """Run a command to its end and discard its output.

    Raises:
        RuntimeError: the command failed; run it by hand to see why.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command} exited with status {process.returncode}; run it by hand to see why")
    return Process(seconds, usage.ru_maxrss / 1024)


def interleaved(actions: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run the actions in turn, for one uncounted round and then `rounds` counted ones.

    Args:
        actions: functions that return the seconds they took, by name.
        rounds: number of counted rounds.

    Returns:
        The seconds of each action in each counted round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 1):
        for name, action in actions.items():
            taken = action()
            if number:
                seconds[name].append(taken)
    return seconds


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """The median over rounds of `numerator / denominator`."""
    return statistics.median(one / other for one, other in zip(numerator, denominator, strict=True))
