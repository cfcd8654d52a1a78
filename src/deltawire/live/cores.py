"""Which cores a thread of ours may use: all that the server was given, not only those its parent computes on."""

import multiprocessing
import os
from contextlib import suppress


def allowed() -> set[int]:
    """The cores of this thread and, in a process that `multiprocessing` started, those of the process it serves.

    OpenMP binds a CPU worker of vLLM to cores of its own, all of its threads, and some are left to the front and the
    engine. The engine's process, which starts the workers, has what the operator gave to vLLM. Empty where threads
    cannot be bound.
    """
    if not hasattr(os, "sched_getaffinity"):
        return set()
    cores, parent = set(os.sched_getaffinity(0)), multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        with suppress(OSError):  # it has ended
            cores |= os.sched_getaffinity(parent.pid)
    return cores


def beside(cores: set[int]) -> set[int]:
    """Those of the allowed cores where a thread can work beside this one, so without a core that this one is bound
    to."""
    mine = os.sched_getaffinity(0) if cores else set()
    return cores - mine if len(mine) == 1 else cores


def move(cores: set[int]) -> None:
    """Run this thread on any of these cores; it inherited those of the one that started it."""
    if cores:
        with suppress(OSError, ValueError):
            os.sched_setaffinity(0, cores)
