"""Work shared among threads: all of it is done, on whichever cores the process has, and an error is not lost."""

import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import SmallRun
from test_staging import plan_for

import deltawire as dw
from deltawire.vllm import lanes, staging
from runs import PATIENCE


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setattr(lanes, "WORTH", 0)
    monkeypatch.setattr(lanes.torch, "get_num_threads", lambda: 2)


@given(sizes=st.lists(st.integers(0, 1000), max_size=12), count=st.integers(1, 4))
def test_every_job_is_in_one_lane_and_no_lane_has_more_than_its_share_and_one_job(sizes, count):
    jobs = [(size, f"job {number}") for number, size in enumerate(sizes)]
    parts = lanes._balanced(jobs, count)
    assert sorted(job for lane in parts for job in lane) == sorted(job for _, job in jobs)
    loads = [sum(size for size, job in jobs if job in lane) for lane in parts]
    assert max(loads) <= sum(sizes) / count + max(sizes, default=0)


def test_two_threads_work_at_once_and_one_does_little_work_alone(two_threads, monkeypatch):
    meet = threading.Barrier(2)
    lanes.share([(1, lambda: meet.wait(PATIENCE)), (1, lambda: meet.wait(PATIENCE))])  # one thread would wait in vain
    monkeypatch.setattr(lanes, "WORTH", 3)
    ran = []
    lanes.share([(1, lambda: ran.append(threading.current_thread()))] * 2)
    assert ran == [threading.current_thread()] * 2


@pytest.mark.parametrize("broken", [0, 1])
def test_an_error_in_either_thread_is_raised_when_nothing_is_under_way_any_more(two_threads, broken):
    before = threading.active_count()

    def fail():
        raise MemoryError("no room")

    jobs = [(10, lambda: None), (10, lambda: None)]
    jobs[broken] = (10, fail)
    with pytest.raises(MemoryError, match="no room"):
        lanes.share(jobs)
    assert threading.active_count() == before


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_the_other_thread_leaves_the_core_that_its_parent_is_bound_to(two_threads):
    mine, seen, stay = os.sched_getaffinity(0), {}, threading.Event()
    other = threading.Thread(target=stay.wait, args=(PATIENCE,), daemon=True)  # as an OpenMP thread on another core
    other.start()
    meet = threading.Barrier(2)

    def look():
        seen[threading.current_thread()] = os.sched_getaffinity(0)
        meet.wait(PATIENCE)

    os.sched_setaffinity(0, {min(mine)})
    try:
        lanes.share([(1, look), (1, look)])
        assert seen.pop(threading.current_thread()) == {min(mine)}
        assert list(seen.values()) == [mine]
    finally:
        os.sched_setaffinity(0, mine)
        stay.set()


def test_an_update_written_by_two_threads_is_the_published_one_and_one_that_fails_is_put_back(two_threads, monkeypatch):
    with SmallRun() as run:
        model = run.model()
        run.weights["v"] += 1
        run.publish(a=1, b=1)
        _, plan = plan_for(run, model, 0, 1)
        original, failed = staging.Scatter.write, []

        def failing(self):
            original(self)
            failed.append(self)
            raise MemoryError("no room on the device")

        with monkeypatch.context() as broken:
            broken.setattr(staging.Scatter, "write", failing)
            with pytest.raises(MemoryError):
                staging.apply(plan.writes)
        assert failed
        assert dw.equal(model.served(), run.versions[0])
        staging.apply(plan.writes)
        assert dw.equal(model.served(), run.versions[1])
