"""A version goes live on all servers or on none: whatever fails, and when, no two versions are left behind."""

import copy
import threading

import msgspec
import pytest
from fleets import Fleet, Member
from waiting import until

import deltawire as dw
from deltawire.errors import AnotherFollower, EngineUnavailable, NotServed
from deltawire.follow.follower import Follower
from deltawire.runlog import heartbeats


@pytest.fixture
def fleet(run):
    """Three engines on version 0, which a broadcast knows, and version 1 in the bucket."""
    with Fleet(run) as fleet:
        assert fleet.broadcast.step() is None
        fleet.assert_serve(0)
        run.publish(a=1, v=-1)
        yield fleet


def cannot_stage(engine):
    def before(moment):
        if moment == "stage":
            raise dw.errors.DtypeMismatch("cannot stage this")

    engine.workers[-1].before = before


def test_a_version_is_written_everywhere_before_any_server_generates_with_it(fleet, run):
    fleet.journal.clear()
    assert [report.version for report in fleet.broadcast.step()] == [1, 1, 1]
    fleet.assert_serve(1)
    calls = [name for _, name in fleet.journal]
    assert calls.count("update") == calls.count("finish") == 3
    assert "finish" not in calls[: len(calls) - calls[::-1].index("update")]
    assert all(follower.health.why_unready() is None for follower in fleet.followers)
    assert fleet.broadcast.health.why_unready() is None
    assert fleet.broadcast.step() is None
    fleet.broadcast.beat()
    beats = {beat.replica: beat.version for _, beat in heartbeats.read_all(run.publisher.bucket)}
    assert beats == {"a": 1, "b": 1, "c": 1}


@pytest.mark.parametrize("who", range(3), ids=["a", "b", "c"])
def test_one_that_cannot_stage_holds_the_version_back_and_no_server_is_paused(fleet, who):
    broken = fleet.engines[who]
    cannot_stage(broken)
    fleet.journal.clear()
    for _ in range(2):
        with pytest.raises(NotServed, match=f"held back .*{broken.url}: .*cannot stage this"):
            fleet.broadcast.step()
    fleet.assert_serve(0)
    assert not [name for _, name in fleet.journal if name in ("pause", "update")]
    others = [follower for follower in fleet.followers if follower.engine is not broken]
    assert all("version 1 waits for" in follower.health.problem for follower in others)
    assert all(follower.health.why_unready() is None for follower in others)
    assert [len(fleet.problems[engine.url]) for engine in fleet.engines if engine is not broken] == [0, 0]
    del broken.workers[-1].before
    assert len(fleet.broadcast.step()) == 3
    fleet.assert_serve(1)
    assert {follower.health.problem for follower in fleet.followers} == {None}


@pytest.mark.parametrize("late", [False, True], ids=["before it acts", "after it acted"])
@pytest.mark.parametrize("call", ["start", "pause", "update"])
@pytest.mark.parametrize("who", [0, 1], ids=["a", "b"])
def test_a_failure_before_all_have_written_is_taken_back_within_the_pause(fleet, run, who, call, late):
    broken = fleet.engines[who]
    broken.fault, broken.late = call, late
    with pytest.raises(NotServed, match=f"version 1 was taken back .*{call} fails"):
        fleet.broadcast.step()
    broken.fault = ""
    fleet.assert_serve(0)
    assert fleet.reports == {"a": [], "b": [], "c": []}
    fleet.journal.clear()
    with pytest.raises(NotServed, match="taken back"):
        fleet.broadcast.step()
    assert fleet.journal == [], "it is not tried again at once"
    run.publish(b=1)
    assert {report.version for report in fleet.broadcast.step()} == {2}
    fleet.assert_serve(2)


def test_a_version_that_was_taken_back_is_tried_again_after_a_minute(fleet):
    now, fleet.engines[2].fault = [0.0], "pause"
    fleet.broadcast.health.clock = lambda: now[0]
    with pytest.raises(NotServed):
        fleet.broadcast.step()
    fleet.engines[2].fault, now[0] = "", 60.0
    assert len(fleet.broadcast.step()) == 3
    fleet.assert_serve(1)


def test_one_that_dies_when_others_have_gone_on_brings_them_back_to_the_old_version(fleet, run):
    fleet.engines[0].dies_at = "finish"
    with pytest.raises(NotServed, match=r"version 1 was taken back .*a does not answer.*may still be served by a"):
        fleet.broadcast.step()
    fleet.assert_serve(0, of="bc")
    assert fleet.reports == {"a": [], "b": [1, 0], "c": [1, 0]}
    fleet.engines[0].dies_at, fleet.engines[0].dead = "", False
    run.publish(b=1)
    assert len(fleet.broadcast.step()) == 3
    fleet.assert_serve(2)


def test_one_that_serves_the_version_though_its_last_call_failed_takes_nothing_back(fleet):
    fleet.engines[1].fault, fleet.engines[1].late = "finish", True
    assert len(fleet.broadcast.step()) == 2
    assert "finish fails" in str(fleet.problems["b"][-1])
    fleet.engines[1].fault = ""
    assert fleet.broadcast.step() is None
    fleet.assert_serve(1)


def test_servers_that_are_down_at_the_start_are_waited_for_and_the_others_are_ready(run):
    with Fleet(run) as fleet:
        run.publish(a=1)
        fleet.engines[1].dead = True
        with pytest.raises(NotServed, match=r"held back .*b does not answer"):
            fleet.broadcast.step()
        assert [follower.health.why_unready() for follower in fleet.followers if follower.replica != "b"] == [None] * 2
        assert isinstance(fleet.problems["b"][0], EngineUnavailable)
        fleet.engines[1].dead = False
        assert len(fleet.broadcast.step()) == 3
        fleet.assert_serve(1)


def test_a_server_that_was_restarted_joins_the_others_alone(fleet, run):
    fleet.broadcast.step()
    started = Member("c", fleet.journal, run.model(0))
    fleet.engines[2].workers, fleet.engines[2].models = started.workers, started.models
    fleet.journal.clear()
    (report,) = fleet.broadcast.step()
    assert (report.version, {name for name, _ in fleet.journal}) == (1, {"c"})
    fleet.assert_serve(1)


def test_a_server_that_another_follower_drives_is_not_taken_from_it(fleet, run, monkeypatch):
    monkeypatch.setattr("deltawire.follow.lease.RENEW", 0.05)
    client = copy.copy(fleet.engines[1])  # to the same workers, with a token of its own
    with Follower(run.url, client, replica="other", take_over=True, pin=0) as other:
        other.lease.me = msgspec.structs.replace(other.lease.me, host="elsewhere")
        other.step()
        with other.lease.renewed(), pytest.raises(NotServed, match="AnotherFollower"):
            fleet.broadcast.step()
        fleet.assert_serve(0)
    assert isinstance(fleet.problems["b"][0], AnotherFollower)


def test_weights_that_drifted_are_remade_on_that_server_alone(run):
    with Fleet(run, audit_every=1) as fleet:
        fleet.broadcast.step()
        run.publish(a=1)
        engine = fleet.engines[0]

        def after(moment):
            if moment == "confirm":
                del engine.workers[0].before
                engine.models[0].v.data[3] = 42.0

        engine.workers[0].before = after
        assert [report.from_version for report in fleet.broadcast.step()] == [0, 0, 0, None]
        fleet.assert_serve(1)


def test_a_broadcast_follows_until_it_is_stopped(fleet, run):
    thread = threading.Thread(target=fleet.broadcast.run)
    thread.start()
    try:
        until(lambda: [engine.reported[-1] for engine in fleet.engines] == ["1"] * 3)
        run.publish(a=1)
        until(lambda: [engine.reported[-1] for engine in fleet.engines] == ["2"] * 3)
    finally:
        fleet.broadcast.stop()
        thread.join(60)
    assert not thread.is_alive()
    for engine in fleet.engines:
        engine.stopping = None
    fleet.assert_serve(2)
