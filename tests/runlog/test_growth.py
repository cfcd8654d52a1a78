"""A run may grow for ever: what a reader or a trainer does at one version costs the same at any length, and what a
stranger leaves in the bucket costs each reader one look."""

import logging
import time

import numpy as np
import pytest
from runs import PATIENCE, commits, edit, fresh, model, publish_all, publishing, read_weights, served

from deltawire import Publisher, Subscriber
from deltawire.buckets.wrappers import Counting
from deltawire.errors import Forked, OtherRun
from deltawire.runlog.keys import HEAD_KEY, way_key
from deltawire.upkeep.compactor import Compactor
from deltawire.weights.tensors import equal

log = logging.getLogger(__name__)
pytestmark = pytest.mark.usefixtures("quick_retries")


def grow(bucket, weights, versions):
    """So many versions more, each of which changes a few weights."""
    with publishing(bucket) as publisher:
        for version in range(versions):
            weights["embed.weight"][version % 60, 0] += np.float32(0.01)
            publisher.publish(weights)
            publisher.flush(PATIENCE)


def calls(bucket, job):
    """How often a job asks the store."""
    metered = Counting(bucket)
    job(metered)
    return metered.traffic.calls


def join(bucket):
    with Subscriber(bucket) as subscriber:
        subscriber.change(None, subscriber.latest().version)


def reopen(bucket):
    Publisher(bucket).close()


def follow_one(bucket, weights):
    """The calls it takes to follow one more version, for one who follows."""
    metered = Counting(bucket)
    with Subscriber(metered) as subscriber:
        here = subscriber.latest()
        grow(bucket, weights, 1)
        before = metered.traffic.calls
        change = subscriber.change(here, subscriber.latest().version)
        assert change.payloads == 1
        return metered.traffic.calls - before


def test_what_is_done_at_one_version_asks_the_store_as_often_at_any_length(tmp_path):
    short, long, weights = fresh(), fresh(), {}
    for bucket, length in ((short, 20), (long, 300)):
        grow(bucket, weights.setdefault(length, model()), length)
        with Compactor(bucket, tmp_path / str(length)) as compactor:
            compactor.step()
    assert calls(long, join) <= 3 * calls(short, join)
    assert calls(long, reopen) <= 3 * calls(short, reopen)
    assert calls(long, lambda bucket: Subscriber(bucket).recent(5)) == calls(
        short, lambda bucket: Subscriber(bucket).recent(5)
    )
    assert follow_one(long, weights[300]) == follow_one(short, weights[20]) <= 4


def test_compacting_asks_the_store_in_proportion_to_what_there_is(tmp_path):
    asked = {}
    for length in (50, 200):
        bucket = fresh()
        grow(bucket, model(), length)

        def compact(metered, length=length):
            with Compactor(metered, tmp_path / f"m{length}", anchors="never") as compactor:
                assert compactor.step()
                before = metered.traffic.calls
                assert compactor.step() == []
                assert metered.traffic.calls - before < 10

        asked[length] = calls(bucket, compact)
    assert asked[200] < 1.2 * 4 * asked[50]


def test_a_compactor_that_goes_on_writes_what_one_that_begins_late_would(tmp_path):
    bucket, weights = fresh(), model()
    grow(bucket, weights, 3)
    with Compactor(bucket, tmp_path / "m", anchors="never") as compactor:
        spans = [(report.parent, report.version) for report in compactor.step()]
        for _ in range(40):
            grow(bucket, weights, 1)
            spans += [(report.parent, report.version) for report in compactor.step()]
    with Compactor(bucket, tmp_path / "other", anchors="never") as late:
        assert late.step() == []
    assert len(spans) == len(set(spans))
    assert {(0, 16), (16, 32), (36, 40)} <= set(spans)
    assert equal(read_weights(bucket), served(weights))


@pytest.mark.parametrize("hint", [None, b"", b"{}", b'{"run":"x","links":[],"format":1}', b"\xff" * 40])
def test_a_hint_that_is_gone_or_damaged_or_stale_stops_nobody(tmp_path, hint):
    bucket, weights = fresh(), model()
    grow(bucket, weights, 20)
    with Compactor(bucket, tmp_path / "m", anchors=16) as compactor:
        compactor.step()
    key = way_key(commits(bucket)[0].run)
    if hint is None:
        bucket.delete(key)
    else:
        bucket.put(key, hint)
    with Subscriber(bucket) as subscriber:
        change = subscriber.change(None, subscriber.latest().version)
    assert equal({name: change.anchor[name].copy() for name in weights} + change.delta, served(weights))


def test_a_hint_at_what_was_removed_stops_nobody(tmp_path):
    bucket, weights = fresh(), model()
    grow(bucket, weights, 20)
    with Compactor(bucket, tmp_path / "m", anchors=16) as compactor:
        compactor.step()
    bucket.delete(
        *[stat.key for stat in bucket.list("runs/") if "/folds/" in stat.key or "/anchors/step_000019" in stat.key]
    )
    grow(bucket, weights, 2)
    with Subscriber(bucket) as subscriber:
        change = subscriber.change(None, subscriber.latest().version)
    assert equal({name: change.anchor[name].copy() for name in weights} + change.delta, served(weights))


@pytest.mark.parametrize("junk", [b"{}", b'{"run":1}', b""])
def test_junk_records_cost_one_look_each(junk):
    bucket, weights, many = fresh(), model(), 300
    grow(bucket, weights, 12)
    run = commits(bucket)[0].run
    for number in range(many):
        bucket.put(f"runs/{run}/derived/fold-000000-000011-{number:012x}.json", junk)
        bucket.put(f"runs/{run}/derived/anchor-000011-{number:012x}.json", junk)
        bucket.put(f"runs/{run}/commits/{number + 100:06d}.json", junk)
    with Subscriber(metered := Counting(bucket)) as subscriber:
        change = subscriber.change(None, subscriber.latest().version)
    assert equal({name: change.anchor[name].copy() for name in weights} + change.delta, served(weights))
    assert metered.traffic.calls < 3 * many + 100


def test_a_damaged_head_stops_neither_reader_nor_trainer():
    bucket, weights = fresh(), model()
    grow(bucket, weights, 4)
    whole = bucket.get(HEAD_KEY, limit=1 << 20)
    with Subscriber(bucket) as follower:
        follower.latest()
        for place in range(len(whole)):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << place % 7
            bucket.put(HEAD_KEY, bytes(damaged))
            assert follower.latest().version == 3
            with Subscriber(bucket) as newcomer:
                assert newcomer.latest().version == 3
    bucket.put(HEAD_KEY, whole[: len(whole) // 2])
    grow(bucket, weights, 1)
    assert equal(read_weights(bucket), served(weights))


def test_a_trainer_that_was_superseded_is_told_and_does_not_take_the_bucket_back():
    bucket, weights = fresh(), model()
    told = pytest.raises(Forked, match="was superseded by run")
    with told, publishing(bucket) as old:
        old.publish(weights)
        old.flush(PATIENCE)
        publish_all(bucket, weights, run="supersede")
        head = bucket.get(HEAD_KEY, limit=1 << 20)
        edit(weights, 1)
        old.publish(weights)
        with pytest.raises(Forked):
            old.flush(PATIENCE)
        assert bucket.get(HEAD_KEY, limit=1 << 20) == head
        old.publish(weights)


def test_a_bucket_whose_run_was_replaced_is_not_taken_back_either():
    bucket, other, weights = fresh(), fresh(), model()
    publish_all(other, model(5))
    with pytest.raises(Forked, match="was replaced by run"), publishing(bucket) as trainer:
        trainer.publish(weights)
        trainer.flush(PATIENCE)
        with Subscriber(bucket) as subscriber:
            subscriber.latest()
            for stat in other.list():
                bucket.put(stat.key, other.get(stat.key, limit=1 << 20))
            with pytest.raises(OtherRun):
                subscriber.latest()
        edit(weights, 1)
        trainer.publish(weights)
        trainer.flush(PATIENCE)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_ten_thousand_versions_are_followed_and_joined_as_a_hundred_are(tmp_path):
    """Times in one run, of one machine: the middle of ten."""
    found = {}
    for length in (100, 10_000):
        bucket, weights = fresh(), model()
        grow(bucket, weights, length)
        started = time.perf_counter()
        with Compactor(bucket, tmp_path / str(length)) as compactor:
            compactor.step()
        compacted = time.perf_counter() - started
        joins, follows = [], []
        with publishing(bucket) as publisher, Subscriber(bucket) as subscriber:
            here = subscriber.latest()
            for step in range(10):
                started = time.perf_counter()
                join(bucket)
                joins.append(time.perf_counter() - started)
                edit(weights, step)
                publisher.publish(weights)
                publisher.flush(PATIENCE)
                started = time.perf_counter()
                here = subscriber.change(here, subscriber.latest().version).position
                follows.append(time.perf_counter() - started)
        found[length] = sorted(joins)[5], sorted(follows)[5], compacted / length
        joined, followed = (f"{seconds * 1e3:.2f} ms" for seconds in found[length][:2])
        log.info("%d versions: join %s, follow one %s, compaction %.1f s", length, joined, followed, compacted)
    short, long = found[100], found[10_000]
    assert long[0] < 3 * short[0]
    assert long[1] < 1.5 * short[1]
    assert long[2] < 2 * short[2]
