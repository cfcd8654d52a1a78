"""Work shared among threads: all of it is done, and an error is not lost."""

import functools
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import PATIENCE
from small import SmallRun
from test_staging import plan_for

import deltawire as dw
from deltawire.live import changes, threads, writes


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setattr(threads, "WORTH", 0)
    monkeypatch.setattr(threads.cores, "allowed", lambda: {0, 1})


@given(count=st.integers(0, 40))
def test_every_job_is_done_once(count):
    done = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(threads.cores, "allowed", lambda: {0, 1, 2})
        threads.run_together([functools.partial(done.append, number) for number in range(count)], threads.WORTH)
    assert sorted(done) == list(range(count))


def test_a_thread_that_is_done_takes_what_another_has_not_begun(two_threads):
    held, done = threading.Event(), []
    jobs = [lambda: held.wait(PATIENCE), *[functools.partial(done.append, number) for number in range(8)], held.set]
    threads.run_together(jobs, 10)  # the first to begin is held until the other has done all the rest
    assert done == list(range(8))


def test_two_threads_work_at_once_and_one_does_little_work_alone(two_threads, monkeypatch):
    meet = threading.Barrier(2)
    threads.run_together([lambda: meet.wait(PATIENCE)] * 2, 2)  # one thread would wait in vain
    monkeypatch.setattr(threads, "WORTH", 3)
    ran = []
    threads.run_together([lambda: ran.append(threading.current_thread())] * 2, 2)
    assert ran == [threading.current_thread()] * 2


@pytest.mark.parametrize("fails_here", [True, False])
def test_an_error_in_either_thread_is_raised_when_nothing_is_under_way_any_more(two_threads, fails_here):
    before, here, meet = threading.active_count(), threading.current_thread(), threading.Barrier(2)

    def job():
        meet.wait(PATIENCE)
        if (threading.current_thread() is here) == fails_here:
            raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        threads.run_together([job, job], 2)
    assert threading.active_count() == before


def test_an_interrupt_is_raised_only_when_the_other_thread_has_ended(two_threads, monkeypatch):
    here, meet, done = threading.current_thread(), threading.Barrier(2), []

    def job():
        meet.wait(PATIENCE)
        if threading.current_thread() is not here:
            interrupted.wait(PATIENCE)
            done.append("written")

    interrupted, join = threading.Event(), threading.Thread.join

    def interrupt_once(thread, *args):
        if not interrupted.is_set():
            interrupted.set()
            raise KeyboardInterrupt
        join(thread, *args)

    monkeypatch.setattr(threading.Thread, "join", interrupt_once)
    with pytest.raises(KeyboardInterrupt):
        threads.run_together([job, job], 2)
    assert done == ["written"]


def test_where_no_thread_can_be_started_one_does_all(two_threads, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    done = []
    threads.run_together([functools.partial(done.append, number) for number in range(4)], 4)
    assert done == [0, 1, 2, 3]


def test_an_update_written_by_two_threads_is_the_published_one_and_one_that_fails_is_put_back(two_threads, monkeypatch):
    monkeypatch.setattr(changes, "PIECE", 3)
    with SmallRun() as run:
        model = run.model()
        run.weights["v"] += 1
        run.publish(a=1, b=1)
        _, plan = plan_for(run, model, 0, 1)
        scatters = [write for write in plan.writes if isinstance(write, writes.Scatter)]
        assert len(scatters) > len({id(write.memory) for write in scatters})  # a tensor's changes are several writes
        original, failed = writes.Scatter.write, []

        def failing(self):
            original(self)
            failed.append(self)
            raise MemoryError("no room on the device")

        with monkeypatch.context() as broken:
            broken.setattr(writes.Scatter, "write", failing)
            with pytest.raises(MemoryError):
                writes.apply(plan.writes)
        assert failed
        assert dw.equal(model.served(), run.versions[0])
        writes.apply(plan.writes)
        assert dw.equal(model.served(), run.versions[1])
