"""Jobs of the inner loops on all cores that this process may use: the loops release the GIL."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_Job = TypeVar("_Job")
_Done = TypeVar("_Done")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(work: Callable[[_Job], _Done], jobs: Sequence[_Job], *, worth: bool = True) -> Iterator[_Done]:
    """The jobs' results in order; by a thread a core where there are several jobs, and they are `worth` the threads,
    which cost some 0.2 ms."""
    count = min(cores(), len(jobs)) if worth else 1
    if count < 2:
        return map(work, jobs)
    with ThreadPoolExecutor(count, "deltawire-codec") as pool:
        return iter(list(pool.map(work, jobs)))
