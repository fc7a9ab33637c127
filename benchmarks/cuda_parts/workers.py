"""Run comparisons side by side in processes: most of their time is Python's, and a crash costs one of them alone.

Not for anything that is timed.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any

from .results import Result, attempt_all

Job = Callable[[], Iterator[Result]]


def side_by_side(jobs: Mapping[str, Job], workers: int) -> Iterator[Result]:
    """The results of all jobs, as they come.

    Args:
        jobs: what to run, by the name that begins its cases. They run in forks of this process, which must not have
            used the GPU.
        workers: number of processes at once; 1 runs the jobs here.
    """
    if workers == 1:
        for name, job in jobs.items():
            yield from attempt_all(name, job)
        return
    waiting: list[tuple[str, Job]] = list(jobs.items())
    running: dict[Any, tuple[str, Any]] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            name, job = waiting.pop(0)
            connection, process = _start(name, job)
            running[connection] = name, process
        ready: list[Any] = wait(list(running))
        for connection in ready:
            try:
                yield connection.recv()
            except EOFError:
                name, process = running.pop(connection)
                process.join()
                if process.exitcode:
                    error = f"its process ended with exit status {process.exitcode}"
                    yield {"case": name, "status": "error", "error": error}


def _start(name: str, job: Job):
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(name, job, theirs))
    process.start()
    theirs.close()  # so that its end is seen here
    return ours, process


def _work(name: str, job: Job, results: Connection) -> None:
    import torch

    torch.set_num_threads(1)  # threads of several workers would wait for each other's cores
    for result in attempt_all(name, job):
        results.send(result)
