"""Threads of ours use the cores that the server was given, however OpenMP bound the one that starts them."""

import json
import os
import subprocess
import sys
import threading

import pytest

from deltawire.vllm import cores, lanes
from runs import PATIENCE

LOOK = """
import json, os, threading
import torch
from deltawire.vllm import cores

torch.zeros(1)
spread = []
def other():
    cores.move(cores.allowed())
    spread.extend(os.sched_getaffinity(0))
thread = threading.Thread(target=other)
thread.start()
thread.join()
print(json.dumps({"mine": sorted(os.sched_getaffinity(0)), "spread": sorted(spread)}))
"""
MANY = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores to choose from"
)


def look(**environment):
    names = {name: value for name, value in os.environ.items() if name not in cores.BINDINGS}
    answer = subprocess.run(
        [sys.executable, "-c", LOOK],
        check=False,
        env=names | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


@MANY
def test_a_thread_leaves_the_core_that_openmp_bound_its_parent_to():
    mine = sorted(os.sched_getaffinity(0))
    assert look(OMP_PROC_BIND="true", OMP_PLACES=f"{{{mine[0]}}}") == {"mine": mine[:1], "spread": mine}


@MANY
def test_a_process_that_was_given_one_core_keeps_to_it():
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(mine)})  # as `taskset` does for what it starts
    try:
        child = look()
        assert child == {"mine": [min(mine)], "spread": [min(mine)]}
        assert look(OMP_PROC_BIND="true") == child  # its parent, this process, has no more
    finally:
        os.sched_setaffinity(0, mine)


@MANY
def test_work_is_shared_with_the_cores_that_were_left_to_others(monkeypatch):
    monkeypatch.setattr(lanes, "WORTH", 0)
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    mine, seen, meet = os.sched_getaffinity(0), {}, threading.Barrier(2)

    def job():
        seen[threading.current_thread()] = os.sched_getaffinity(0)
        meet.wait(PATIENCE)

    os.sched_setaffinity(0, {min(mine)})
    try:
        lanes.share([job, job], 2)
    finally:
        os.sched_setaffinity(0, mine)
    assert seen.pop(threading.current_thread()) == {min(mine)}
    assert list(seen.values()) == [os.sched_getaffinity(os.getppid()) - {min(mine)}]
