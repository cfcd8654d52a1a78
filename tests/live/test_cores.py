"""Threads of ours use the cores that the server was given, however OpenMP bound the one that starts them."""

import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor

import pytest
from programs import program
from runs import PATIENCE

from deltawire.live import cores, threads

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores to choose from"
)


@pytest.fixture
def mine():
    """The cores of this process, given back to this thread at the end."""
    cores = os.sched_getaffinity(0)
    yield cores
    os.sched_setaffinity(0, cores)


def where_a_thread_moves() -> tuple[set[int], set[int]]:
    """The cores of this thread, and those of a thread that it starts, moved to all allowed ones."""
    import torch  # with it OpenMP begins, and reads its environment

    torch.zeros(1)
    moved = set()

    def other():
        cores.move(cores.allowed())
        moved.update(os.sched_getaffinity(0))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join(PATIENCE)
    return os.sched_getaffinity(0), moved


def as_a_worker(environment: dict[str, str]) -> tuple[set[int], set[int]]:
    """The same in a process started as vLLM starts its workers, where OpenMP reads its environment."""
    with pytest.MonkeyPatch.context() as patched:
        for name, value in environment.items():
            patched.setenv(name, value)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(where_a_thread_moves).result(PATIENCE)


def test_a_worker_that_openmp_bound_to_one_core_uses_those_of_the_process_it_serves(mine):
    first = min(mine)
    bound = {"OMP_PROC_BIND": "true", "OMP_PLACES": f"{{{first}}}"}
    assert as_a_worker(bound) == ({first}, mine)


def test_a_worker_of_a_process_that_has_one_core_keeps_to_it(mine):
    os.sched_setaffinity(0, {min(mine)})
    assert as_a_worker({}) == ({min(mine)}, {min(mine)})


def test_a_process_of_its_own_keeps_to_its_core_though_its_parent_has_more(mine):
    command = [sys.executable, program("allowed_cores"), str(min(mine))]
    started = subprocess.run(command, check=True, capture_output=True, text=True)
    assert started.stdout == str({min(mine)})


def test_work_is_shared_with_the_cores_that_were_left_to_others(mine, monkeypatch):
    monkeypatch.setattr(threads, "WORTH", 0)
    monkeypatch.setattr(cores, "allowed", lambda: mine)
    seen, meet = {}, threading.Barrier(2)

    def job():
        seen[threading.current_thread()] = os.sched_getaffinity(0)
        meet.wait(PATIENCE)

    os.sched_setaffinity(0, {min(mine)})
    threads.run_together([job, job], 2)
    assert seen.pop(threading.current_thread()) == {min(mine)}
    assert list(seen.values()) == [mine - {min(mine)}]
