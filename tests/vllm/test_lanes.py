"""Work shared among threads: all of it is done, and an error is not lost."""

import functools
import threading
import time

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
    monkeypatch.setattr(lanes.cores, "allowed", lambda: {0, 1})


@given(seconds=st.lists(st.sampled_from([0, 0, 0.001]), max_size=12))
def test_every_job_is_done_once_whatever_the_threads_make_of_it(seconds):
    done = []

    def job(number, pause):
        time.sleep(pause)
        done.append(number)

    jobs = [functools.partial(job, number, pause) for number, pause in enumerate(seconds)]
    lanes.share(jobs, lanes.WORTH)
    assert sorted(done) == list(range(len(seconds)))


def test_a_thread_that_is_done_takes_what_another_has_not_begun(two_threads):
    held, done = threading.Event(), []
    jobs = [lambda: held.wait(PATIENCE), *[functools.partial(done.append, number) for number in range(8)], held.set]
    lanes.share(jobs, 10)  # the first to begin is held until the other has done all the rest
    assert done == list(range(8))


def test_two_threads_work_at_once_and_one_does_little_work_alone(two_threads, monkeypatch):
    meet = threading.Barrier(2)
    lanes.share([lambda: meet.wait(PATIENCE)] * 2, 2)  # one thread would wait in vain
    monkeypatch.setattr(lanes, "WORTH", 3)
    ran = []
    lanes.share([lambda: ran.append(threading.current_thread())] * 2, 2)
    assert ran == [threading.current_thread()] * 2


@pytest.mark.parametrize("broken", [0, 1])
def test_an_error_in_either_thread_is_raised_when_nothing_is_under_way_any_more(two_threads, broken):
    before = threading.active_count()

    def fail():
        raise MemoryError("no room")

    meet = threading.Barrier(2)
    jobs = [lambda: meet.wait(PATIENCE), lambda: meet.wait(PATIENCE)]
    jobs[broken] = lambda: (meet.wait(PATIENCE), fail())
    with pytest.raises(MemoryError, match="no room"):
        lanes.share(jobs, 2)
    assert threading.active_count() == before


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
