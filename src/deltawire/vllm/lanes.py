"""Writes to host memory shared among the cores that this process may use: one core waits for memory and does not fill
the bus, and while a server is paused the others have nothing to do."""

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

MOST = 4
"""threads; two were measured to write 1.9 times as fast as one, where each has a core"""
WORTH = 200_000
"""elements, about a millisecond's work, below which starting a thread does not pay"""
Job = tuple[int, Callable[[], None]]
"""how much a piece of work is, and the work"""


def share(jobs: Sequence[Job]) -> None:
    """Do every job, in any order. The first error is raised when nothing is under way any more; jobs that no thread had
    begun by then are left out."""
    count = min(torch.get_num_threads(), MOST, len(jobs)) if sum(size for size, _ in jobs) >= WORTH else 1
    lanes, errors = _balanced(jobs, max(count, 1)), list[BaseException]()

    def run(lane: list[Callable[[], None]]) -> None:
        try:
            for job in lane:
                if errors:
                    return
                job()
        except BaseException as error:
            errors.append(error)

    cores = _cores() if count > 1 else set()

    def run_beside(lane: list[Callable[[], None]]) -> None:
        if cores:  # a thread inherits the core that OpenMP gave its parent, which is busy
            with suppress(OSError):
                os.sched_setaffinity(0, cores)
        run(lane)

    threads = [threading.Thread(target=run_beside, args=(lane,), name="deltawire-write") for lane in lanes[1:]]
    try:
        for thread in threads:
            thread.start()
        run(lanes[0])
    finally:
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    if errors:
        raise errors[0]


def _balanced(jobs: Sequence[Job], count: int) -> list[list[Callable[[], None]]]:
    """The jobs in so many lanes of about equal work: the largest first, each where there is least."""
    lanes: list[list[Callable[[], None]]] = [[] for _ in range(count)]
    loads = [0] * count
    for size, job in sorted(jobs, key=lambda job: -job[0]):
        least = loads.index(min(loads))
        lanes[least].append(job)
        loads[least] += size
    return lanes


def _cores() -> set[int]:
    """Every core that some thread of this process may use; none where threads are not bound to cores. vLLM's CPU
    workers bind each OpenMP thread to a core of the worker's own."""
    if not hasattr(os, "sched_setaffinity"):
        return set()
    cores = set(os.sched_getaffinity(0))
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it has ended
            cores |= os.sched_getaffinity(int(task.name))
    return cores
