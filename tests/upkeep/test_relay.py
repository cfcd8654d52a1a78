"""A bucket nearby: the same bytes in the order of a trainer, fetched once however many servers read it."""

import time
from collections import Counter

import pytest
from faults import Faulty, down, from_write, on_key
from runs import chain_of_four, commits, edit, fresh, model, publish_all, publishing, read_weights, served
from small import Fused, SmallRun, make_weights
from stub_engine import StubEngine
from verbs import records, run_verb

import deltawire as dw
from deltawire.errors import AccessRefused, BadDigest, BadSignature, DeltaWireError, NotFound, Unavailable
from deltawire.follow.follower import Follower
from deltawire.runlog import heartbeats
from deltawire.runlog.heartbeats import Heartbeat
from deltawire.runlog.signing import generate_key
from deltawire.upkeep.compactor import Compactor
from deltawire.upkeep.passed_on import PassedOn
from deltawire.upkeep.relay import Relay
from deltawire.upkeep.retention import Policy, carry_out, find_prunable
from deltawire.vllm.client import EngineClient


def objects(bucket) -> dict[str, bytes]:
    return {stat.key: bucket.get(stat.key, limit=1 << 20) for stat in bucket.list()}


def test_a_relay_holds_the_same_bytes_and_goes_on_as_versions_come():
    source, weights = chain_of_four()
    target = fresh()
    relay = Relay(source, target)
    first = relay.step()
    assert (first.since, first.version) == (None, 3)
    assert objects(target) == objects(source)
    assert dw.equal(read_weights(target), weights[-1])
    assert relay.step() is None
    with publishing(source) as publisher:
        publisher.publish(model(seed=9))
        publisher.flush(20)
    again = relay.step()
    assert (again.since, again.version, again.objects) == (3, 4, 2)
    assert objects(target) == objects(source)


def test_a_relay_begins_at_the_newest_anchor(tmp_path):
    source, weights = chain_of_four()
    with Compactor(source, tmp_path / "mirror", anchors=2) as compactor:
        compactor.step()
    target = fresh()
    Relay(source, target).step()
    assert commits(target)[0].version > 0
    assert dw.equal(read_weights(target), weights[-1])
    assert len(objects(target)) < len(objects(source))


@pytest.mark.parametrize("write", range(12))
@pytest.mark.parametrize("after", [False, True])
def test_a_relay_killed_at_any_write_leaves_an_older_bucket_and_the_next_one_finishes(write, after):
    source, weights = chain_of_four()
    target = fresh()
    dying = Faulty(target, from_write(write, after=after))
    with pytest.raises(Unavailable):
        Relay(source, dying).step()
        raise Unavailable("it had fewer writes than that")
    with dw.Subscriber(target) as subscriber:
        try:
            subscriber.latest()
        except NotFound:
            pass
        else:
            assert dw.equal(read_weights(target), weights[subscriber.latest().version])
    Relay(source, target).step()
    assert objects(target) == objects(source)


def test_what_is_damaged_on_its_way_is_not_passed_on():
    source, _ = chain_of_four()
    (key,) = [stat.key for stat in source.list() if "/deltas/step_000002" in stat.key]
    data = bytearray(source.get(key, limit=1 << 20))
    data[-1] ^= 1
    source.put(key, bytes(data))
    target = fresh()
    with pytest.raises(BadDigest):
        Relay(source, target).step()
    assert key not in objects(target)


def test_a_relay_that_trusts_a_key_copies_nothing_else(tmp_path):
    mine, other = (generate_key(tmp_path / name) for name in ("mine", "other"))
    source = fresh()
    publish_all(source, model(), signing_key=tmp_path / "mine")
    target = fresh()
    with pytest.raises(BadSignature):
        Relay(source, target, trusted=[other.public]).step()
    assert not objects(target)
    Relay(source, target, trusted=[mine.public]).step()
    with dw.Subscriber(target, trusted=[mine.public]) as subscriber:
        assert subscriber.latest().version == 0


def test_a_run_that_takes_anothers_place_is_copied_too():
    source, _ = chain_of_four()
    target = fresh()
    relay = Relay(source, target)
    relay.step()
    weights = model(seed=5)
    with publishing(source, run="supersede") as publisher:
        publisher.publish(weights)
        publisher.flush(20)
    assert relay.step().since is None
    assert dw.equal(read_weights(target), served(weights))


def test_a_relay_that_fell_behind_a_prune_begins_at_an_anchor(tmp_path):
    source, weights = fresh(), model()
    publish_all(source, weights)
    target = fresh()
    Relay(source, target).step()
    for step in range(6):
        edit(weights, step)
        publish_all(source, weights)
    with Compactor(source, tmp_path / "mirror", anchors=3) as compactor:
        compactor.step()
    run = commits(source)[0].run
    carry_out(source, find_prunable(source, run, Policy(anchors=1, hours=0)))
    assert Relay(source, target).step().version == 6
    with dw.Subscriber(target) as subscriber:
        change = subscriber.change(None, 6)
        held = {name: bits.copy() for name, bits in change.anchor.items()}
        change.delta.apply_(held)
    assert dw.equal(held, served(weights))


def test_several_servers_read_a_relay_and_the_bucket_is_asked_once(tmp_path):
    with SmallRun(tmp_path / "far") as run:
        run.publish(a=0.01)
        far, fetched = dw.open_bucket(run.url), Counter()
        get_file, get = far.get_file, far.get
        far.get_file = lambda key, path, **options: (fetched.update([key]), get_file(key, path, **options))[1]
        far.get = lambda key, **options: (fetched.update([key]), get(key, **options))[1]
        near = (tmp_path / "near").as_uri()
        Relay(far, dw.open_bucket(near, create=True)).step()
        payloads = {key: count for key, count in fetched.items() if key.endswith(".safetensors")}
        assert len(payloads) == 2 and {*payloads.values()} == {1}
        before = fetched.total()
        for _ in range(3):
            with (
                StubEngine(Fused(make_weights(seed=3))) as engine,
                Follower(near, EngineClient(engine.url)) as follower,
            ):
                assert follower.step().version == 1
        assert fetched.total() == before


def test_the_loop_tells_of_trouble_and_tries_again():
    source, target = fresh(), fresh()
    relay, steps, problems = Relay(source, target), [], []
    turns = iter(range(3))

    def problem(error: DeltaWireError) -> None:
        problems.append(error)
        publish_all(source, model())

    relay.run(steps.append, problem, going=lambda: next(turns, None) is not None, look=0.0)
    assert [type(error) for error in problems] == [NotFound]
    assert [step.version for step in steps] == [0]


def beats_of(bucket):
    return {beat.replica: beat for _, beat in heartbeats.read_all(bucket)}


def test_heartbeats_are_passed_on_when_they_change_and_at_most_every_30_seconds():
    source, target, now = fresh(), fresh(), [0.0]
    passing = PassedOn(source, target, clock=lambda: now[0])
    assert passing.step() == 0
    for version in range(4):
        heartbeats.beat(target, Heartbeat("a", "0" * 16, version, every=5.0, at=float(version)))
        assert passing.step() == (version == 0), "no other within 30 seconds"
        assert beats_of(source)["a"].version == 0
    now[0] = 30.0
    heartbeats.beat(target, Heartbeat("b", "0" * 16, 1, unready="joining"))
    assert [passing.step(), passing.step()] == [2, 0], "what did not change is not written again"
    seen = beats_of(source)
    assert (seen["a"].version, seen["a"].at, seen["a"].every) == (3, 3.0, 60.0)
    assert (seen["b"].version, seen["b"].unready) == (1, "joining")


def test_a_relay_that_is_started_again_makes_no_silent_replica_seem_alive():
    source, target = fresh(), fresh()
    heartbeats.beat(target, Heartbeat("a", "0" * 16, 1))
    assert PassedOn(source, target, now=lambda: time.time() + 3600).step() == 0
    assert beats_of(source) == {}
    assert PassedOn(source, target).step() == 1


def test_a_store_that_says_later_is_asked_again_and_one_that_refuses_is_told_of_once():
    source, target = fresh(), fresh()
    heartbeats.beat(target, Heartbeat("a", "0" * 16, 1))
    later = PassedOn(Faulty(source, on_key("replicas/")), target)
    assert [later.step(), later.step()] == [0, 1]
    heartbeats.beat(target, Heartbeat("a", "0" * 16, 2))
    plan, _ = down(AccessRefused("the token may only read"))
    refused = PassedOn(Faulty(source, plan), target)
    with pytest.raises(AccessRefused, match="only read; `status` there will not show who follows memory://"):
        refused.step()
    assert refused.step() == 0


def test_status_of_the_source_shows_who_follows_the_relay(tmp_path):
    with SmallRun(tmp_path / "far") as run:
        run.publish(a=0.01)
        near = (tmp_path / "near").as_uri()
        relay = Relay(dw.open_bucket(run.url), dw.open_bucket(near, create=True))
        relay.step()
        with (
            StubEngine(Fused(make_weights(seed=3))) as engine,
            Follower(near, EngineClient(engine.url)) as follower,
        ):
            follower.step()
            follower.beats.write(follower.health.labelled)
            turns = iter(range(1))
            relay.run(pytest.fail, pytest.fail, going=lambda: next(turns, None) is not None, look=0.0)
        (seen,) = records("status", run.url)
        assert [(one["version"], one["state"]) for one in seen["replicas"]] == [(1, "current")]


def test_the_verb_copies_once(tmp_path):
    with SmallRun(tmp_path / "far") as run:
        near = (tmp_path / "near").as_uri()
        (report,) = records("relay", run.url, near, "--once")
        assert (report["event"], report["version"]) == ("relay", 0)
        assert run_verb("relay", run.url, near, "--once").stdout.startswith("nothing to copy: ")
