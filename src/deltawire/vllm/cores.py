"""Which cores a thread of ours may use: all that the server was given, not only the one its parent computes on."""

import os
from contextlib import suppress

BINDINGS = ("OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
"""environment variables that make OpenMP bind a process's threads to cores"""


def allowed() -> set[int]:
    """The cores of this thread and, where OpenMP bound it, those of the parent process.

    vLLM's CPU workers are bound to cores of their own, all of a worker's threads, and some cores are left to the front
    and the engine. Their parent has what the operator gave to vLLM. Empty where threads cannot be bound.
    """
    if not hasattr(os, "sched_getaffinity"):
        return set()
    cores = set(os.sched_getaffinity(0))
    if any(os.environ.get(name) for name in BINDINGS):
        with suppress(OSError):  # the parent has ended
            cores |= os.sched_getaffinity(os.getppid())
    return cores


def elsewhere() -> set[int]:
    """Where a thread can run that works beside this one: not on the core that this one is bound to, if it is to one."""
    cores = allowed()
    mine = os.sched_getaffinity(0) if cores else set()
    return cores - mine if len(mine) == 1 else cores


def move(cores: set[int]) -> None:
    """Run this thread on any of these cores; it inherited those of the one that started it."""
    if cores:
        with suppress(OSError):
            os.sched_setaffinity(0, cores)
