"""Several servers and one process: each has its own health, heartbeat and lease, and none waits for another."""

import threading
from contextlib import ExitStack

import pytest
from fleets import Fleet, Member
from small import Fused, Shard, make_weights
from small_s3 import small_s3
from waiting import until

import deltawire as dw
from deltawire.errors import EngineUnavailable
from deltawire.follow import several
from deltawire.follow.follower import Follower
from deltawire.follow.several import Several
from deltawire.runlog import heartbeats

LONG = 60.0


@pytest.fixture
def fleet(run):
    with Fleet(run) as fleet:
        yield fleet


def test_a_broken_server_holds_up_no_other_and_is_followed_once_it_is_mended(fleet, run, monkeypatch):
    monkeypatch.setattr(several, "SAY_AGAIN", 0.02)
    broken = fleet.engines[1]
    begin_init = broken.begin_init

    def fails(*arguments, **options):
        raise RuntimeError("a fault that no follower knows")

    broken.begin_init = fails
    followers = Several(fleet.followers)
    thread = threading.Thread(target=followers.run)
    thread.start()
    try:
        run.publish(a=1)
        until(lambda: all(engine.reported[-2:] == ":1" for engine in fleet.engines if engine is not broken))
        until(lambda: fleet.problems["b"], seconds=LONG)
        assert [follower.health.why_unready() is None for follower in fleet.followers] == [True, False, True]
        assert "that no follower knows" in fleet.followers[1].health.problem
        broken.begin_init = begin_init
        until(lambda: broken.reported[-2:] == ":1", seconds=LONG)
        until(lambda: rows(run) == {"a": 1, "b": 1, "c": 1}, seconds=LONG)
    finally:
        followers.stop()
        thread.join(LONG)
    assert not thread.is_alive()
    assert fleet.followers[1].health.problem is None


def rows(run):
    """What the bucket's heartbeats say that each server serves."""
    return {beat.replica: beat.version for _, beat in heartbeats.read_all(run.publisher.bucket)}


def test_one_step_brings_every_server_that_can_to_the_version_and_raises_for_the_other(fleet, run):
    run.publish(a=1)
    fleet.engines[0].dead = True
    followers = Several(fleet.followers)
    with pytest.raises(EngineUnavailable, match="a does not answer"):
        followers.step()
    fleet.assert_serve(1, of="bc")
    fleet.engines[0].dead = False
    assert [report and report.version for report in followers.step()] == [1, None, None]
    fleet.assert_serve(1)


def test_the_workers_of_several_servers_on_a_host_fetch_each_payload_once(tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAWIRE_CACHE", str(tmp_path))
    trained, others = make_weights(), make_weights(seed=5)
    engines = [Member("x", [], Fused(others)), Member("y", [], *(Shard(others, rank) for rank in range(2)))]
    with small_s3() as store, ExitStack() as stack:
        publisher = stack.enter_context(dw.Publisher(dw.open_bucket("s3://weights/run")))
        followers = Several(
            [stack.enter_context(Follower("s3://weights/run", engine, replica=engine.url)) for engine in engines]
        )
        for version in range(3):
            publisher.publish(trained)
            publisher.flush(LONG)
            assert [report.version for report in followers.step()] == [version] * 2
            trained["a"][version] += 1
        fetched = [one.key for one in store.asked if one.method == "GET" and one.key.endswith(".safetensors")]
        assert sorted(fetched) == sorted(key for key in store.objects if key.endswith(".safetensors"))
    assert dw.equal(engines[0].served(), engines[1].served())
