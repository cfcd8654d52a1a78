"""One follower drives a server: a second is refused or takes over, and one that comes back late changes nothing."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from small import Shard, SmallRun
from stub_engine import StubEngine
from waiting import PATIENCE, until

import deltawire as dw
from deltawire.errors import AnotherFollower, EngineError, EngineUnavailable
from deltawire.follow.follower import Follower
from deltawire.live.lease import TTL, Holder, Lease, this_follower
from deltawire.vllm.client import EngineClient

HERE = socket.gethostname()
ELSEWHERE = "another-host"


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Place:
    """Two runs of one model, and a server of it: of one worker, or of two whose clocks differ."""

    def __init__(self, workers: int) -> None:
        self.mine, self.theirs = SmallRun(), SmallRun(seed=1)
        models = [Shard(self.mine.versions[0], rank) for rank in range(2)] if workers == 2 else [self.mine.model()]
        self.engine, self.models, self.clock = StubEngine(*models), models, Clock()
        self.anybody = EngineClient(self.engine.url)
        for rank, worker in enumerate(self.engine.workers):
            worker.lease = Lease(self.clock if rank == 0 else lambda: self.clock.now * 1000)

    def __enter__(self) -> "Place":
        return self

    def __exit__(self, *exc: object) -> None:
        self.anybody.close()
        self.engine.stop()
        for run in (self.mine, self.theirs):
            run.publisher.close(10)

    def follower(self, run: SmallRun, *, host: str = HERE, replica: str = "", engine=None, **options) -> Follower:
        """Of another process than this one, which runs: this one's parent."""
        follower = Follower(run.url, engine or EngineClient(self.engine.url), **options)
        parent, here = os.getppid(), follower.lease.me
        started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
        follower.lease.me = Holder(replica or f"replica-{id(follower)}", parent, started, host, here.bucket)
        return follower

    def assert_serves(self, run: SmallRun, version: int) -> None:
        """All workers hold it, under its name, at rest."""
        served = Shard.served(self.models) if len(self.models) == 2 else self.models[0].served()
        assert dw.equal(served, run.versions[version])
        assert self.engine.weight_version == f"{run.publisher.position.run}:{version}"
        assert (self.engine.paused, self.engine.session_open) == (False, False)
        assert self.anybody.audit().mismatched == []


@pytest.fixture
def place(request, monkeypatch):
    monkeypatch.setattr("deltawire.follow.lease.LOOK", 0.02)
    with Place(getattr(request, "param", 2)) as place:
        yield place


@pytest.mark.parametrize("place", [1, 2], indirect=True, ids=["one worker", "two"])
def test_a_second_follower_is_refused_by_name_while_the_first_renews_its_lease(place):
    with place.follower(place.mine, host=ELSEWHERE) as first, ThreadPoolExecutor() as pool:
        first.step()
        place.clock.now += 3
        with place.follower(place.theirs) as second:
            step = pool.submit(second.step)
            until(lambda: len(place.engine.calls) > 20)
            assert not step.done()  # the first may be gone
            first.step()
            with pytest.raises(AnotherFollower) as refused:
                step.result(PATIENCE)
        for told in (str(os.getppid()), ELSEWHERE, place.mine.url, "since 3 s", "--take-over"):
            assert told in str(refused.value)
        place.assert_serves(place.mine, 0)
        assert place.anybody.status().lease.holder.host == ELSEWHERE


def test_a_follower_that_was_told_to_takes_over_and_the_first_stops(place):
    with (
        place.follower(place.mine, host=ELSEWHERE) as first,
        place.follower(place.theirs, take_over=True) as second,
    ):
        first.step()
        second.step()
        place.assert_serves(place.theirs, 0)
        place.mine.publish(a=1)
        with pytest.raises(AnotherFollower):
            first.step()
        with pytest.raises(AnotherFollower):
            first.run()
        place.assert_serves(place.theirs, 0)


def test_a_lease_that_ended_is_taken_and_a_paused_server_resumed_before_the_bucket_is_asked(place, monkeypatch):
    with place.follower(place.mine, host=ELSEWHERE) as first, place.follower(place.theirs) as second:
        first.step()
        place.anybody.start()
        place.anybody.pause("keep", clear_cache=True)
        place.clock.now += TTL + 1
        monkeypatch.setattr(second.bucket, "watch", lambda *args, **options: second.stopping.set())
        second.run()  # its bucket says nothing
        assert (place.engine.paused, place.engine.session_open) == (False, False)


@pytest.mark.parametrize("how", ["ended", "same replica elsewhere", "same process"])
def test_who_is_known_to_be_gone_is_replaced_at_once(place, how):
    with place.follower(place.mine, replica="r", host=ELSEWHERE) as first, place.follower(place.mine) as second:
        if how == "ended":
            with subprocess.Popen([sys.executable, "-c", ""]) as ended:
                first.lease.me = Holder("x", ended.pid, "1", HERE, "b")
        elif how == "same process":
            first.lease.me = second.lease.me
        else:
            second.lease.me = this_follower("r", "b")
        first.step()
        second.step()
        with pytest.raises(AnotherFollower):
            first.step()


def test_a_process_of_this_host_that_runs_is_not_replaced_under_the_same_name(place):
    with place.follower(place.mine, replica="r") as first, ThreadPoolExecutor() as pool:
        first.step()
        assert not first.lease.me.is_gone()
        with Follower(place.theirs.url, EngineClient(place.engine.url), replica="r") as second:
            step = pool.submit(second.step)
            until(lambda: len(place.engine.calls) > 20)
            first.step()
            with pytest.raises(AnotherFollower):
                step.result(PATIENCE)


def test_a_follower_that_is_closed_lets_go(place):
    with place.follower(place.mine, host=ELSEWHERE) as first:
        first.step()
    with place.follower(place.theirs) as second:
        second.step()
    place.assert_serves(place.theirs, 0)


def test_a_long_stage_and_a_long_wait_for_the_bucket_keep_the_lease(place, monkeypatch):
    monkeypatch.setattr("deltawire.follow.lease.RENEW", 0.01)
    with place.follower(place.mine, host=ELSEWHERE) as first, ThreadPoolExecutor() as pool:
        monkeypatch.setattr(first.bucket, "watch", lambda *args, **options: first.stopping.wait(PATIENCE) and None)
        running = pool.submit(first.run)
        until(lambda: place.anybody.status().lease.turn > 10)
        first.close()
        running.result(PATIENCE)


class Late(EngineClient):
    """A client that stops before one of its calls, and goes on when another follower has taken over."""

    def __init__(self, url, moment, meanwhile) -> None:
        super().__init__(url)
        original = getattr(self, moment)

        def late(*arguments, **options):
            setattr(self, moment, original)
            meanwhile()
            return original(*arguments, **options)

        setattr(self, moment, late)


@pytest.mark.parametrize("moment", ["stage", "start", "pause", "update", "finish", "resume"])
def test_a_follower_that_comes_back_after_losing_the_lease_changes_nothing(place, moment):
    """The other withdraws the very version that the first was about to write, or had written."""
    with place.follower(place.mine, host=ELSEWHERE) as initial:
        initial.step()
    place.mine.publish(a=1, v=1)
    with place.follower(place.mine, host=ELSEWHERE, pin=0) as second:

        def meanwhile():
            place.clock.now += TTL + 1
            second.step()

        with place.follower(place.mine, engine=Late(place.engine.url, moment, meanwhile)) as first:
            try:
                first.step()  # it may have been done already, but for the answer
            except EngineError as error:
                assert isinstance(error, AnotherFollower), error
            with pytest.raises(AnotherFollower):
                first.step()
            assert second.step() is None
            place.assert_serves(place.mine, 0)
    with place.follower(place.mine) as third:
        assert third.step().version == 1
        place.assert_serves(place.mine, 1)


@pytest.mark.parametrize("place", [1, 2], indirect=True, ids=["one worker", "two"])
def test_a_call_by_hand_is_refused_while_a_follower_drives_and_the_follower_hears_nothing_of_it(place):
    body = {"update_info": {"bucket": place.theirs.url, "version": 0}}
    with place.follower(place.mine) as first:
        first.step()
        anybody = place.anybody
        anybody.start()
        place.engine.do("/update_weights", body)
        place.engine.do("/init_weight_transfer_engine", {"init_info": {"bucket": place.theirs.url}})
        assert anybody.status().error.kind == "AnotherFollower"
        with pytest.raises(AnotherFollower):
            anybody.stage(place.theirs.url, 0)
        place.mine.publish(a=1)
        assert first.step().version == 1
        place.assert_serves(place.mine, 1)


def test_a_server_that_was_started_again_knows_nobody_and_is_taken_again(place):
    with place.follower(place.mine) as first:
        first.step()
        for worker in place.engine.workers:
            worker.lease = Lease()
        with pytest.raises(EngineUnavailable, match="take it again"):
            first.engine.stage(place.mine.url, 0)
        place.mine.publish(a=1)
        assert first.step().version == 1


def test_workers_follow_the_first_even_if_another_lost_count(place):
    with place.follower(place.mine) as first:
        for worker in place.engine.workers[1:]:
            worker.lease.view(first.engine.token)  # a look that the first worker does not have
        place.mine.publish(a=1)
        assert first.step().version == 1
        place.assert_serves(place.mine, 1)
