"""Seconds on a device, and how fast it reads its memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from .scale import Scale


def seconds(action: Callable[[], object], scale: Scale, repeats: int = 1) -> float:
    """Median seconds of one of `repeats` calls in a row, over the rounds of a scale, after two calls that do not count.

    On a GPU, between two events on its stream.
    """
    for _ in range(2):
        action()
    return statistics.median(_elapsed(action, scale, repeats) / repeats for _ in range(scale.rounds))


def _elapsed(action: Callable[[], object], scale: Scale, repeats: int) -> float:
    if scale.device == "cpu":
        start = time.perf_counter()
        for _ in range(repeats):
            action()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    for _ in range(repeats):
        action()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000


def read_bandwidth(scale: Scale) -> float:
    """Bytes per second that the device reads: the best of a sum and of a product of a matrix with a vector."""
    size = 2**31 if scale.real else 2**22
    numbers = torch.ones(size // 4, dtype=torch.float32, device=scale.device)
    matrix = numbers.view(torch.bfloat16).view(-1, 4096)
    vector = torch.ones(4096, dtype=torch.bfloat16, device=scale.device)
    return max(size / seconds(action, scale, 4) for action in (numbers.sum, lambda: torch.mv(matrix, vector)))


def free_bytes(scale: Scale) -> int:
    """Free memory of the device; 0 on a CPU, where it says nothing."""
    if scale.device == "cpu":
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]
