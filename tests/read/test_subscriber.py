"""Reading a run: verified updates in order from anywhere on the chain, and everything that does not join it refused."""

import tempfile
import tracemalloc

import msgspec
import numpy as np
import pytest
from faults import Faulty, down, never
from runs import (
    PATIENCE,
    chain_of_four,
    commits,
    edit,
    fresh,
    model,
    payload_key,
    position,
    publish_all,
    publishing,
    read_weights,
    served,
    table,
    updates,
)

from deltawire import Subscriber, digest
from deltawire.buckets.wrappers import Counting
from deltawire.errors import (
    DeltaWireError,
    Forked,
    Gap,
    NotFound,
    OtherRun,
)
from deltawire.format import checkpoint
from deltawire.runlog.keys import HEAD_KEY, commit_key, run_key
from deltawire.runlog.records import Head, Position, write
from deltawire.weights.bits import Bits
from deltawire.weights.delta import Delta
from deltawire.weights.digest import root
from deltawire.weights.tensors import equal


@pytest.fixture
def chain():
    return chain_of_four()


def test_updates_come_in_order_from_the_anchor_each_with_the_digests_it_leads_to(chain):
    bucket, expected = chain
    with Subscriber(bucket) as subscriber:
        held, before = {}, None
        for version, update in enumerate(subscriber.updates()):
            if version == 0:
                assert update.delta is None
                held = {name: bits.copy() for name, bits in update.anchor.items()}
            else:
                assert update.anchor is None
                update.delta.apply_(held)
            assert update.parent == before
            assert equal(held, expected[version])
            assert update.digests == digest(held)
            assert update.position.root == root(subscriber.run.table, digest(held)) == update.commit.root
            assert update.wire_bytes == sum(payload.size for payload in update.commit.payloads) > 0
            before = update.position
    assert before.version == 3


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_updates_continue_from_a_position_without_the_anchor(chain, start):
    bucket, expected = chain
    found = updates(bucket, position(bucket, start))
    assert [update.position.version for update in found] == list(range(start + 1, 4))
    assert all(update.anchor is None for update in found)
    assert equal(sum((update.delta for update in found), Delta()).__radd__(expected[start]), expected[3])


def test_updates_stop_where_they_are_told_to(chain):
    bucket, _ = chain
    assert [update.position.version for update in updates(bucket, until=1)] == [0, 1]
    assert [update.position.version for update in updates(bucket, position(bucket, 1), until=2)] == [2]
    assert updates(bucket, position(bucket, 2), until=1) == []
    with pytest.raises(Gap, match="version 9 was never committed; committed are 0 to 3"):
        updates(bucket, until=9)


@pytest.mark.usefixtures("quick_retries")
def test_a_version_that_went_into_a_later_one_is_named_with_its_neighbours():
    bucket, weights = Faulty(fresh()), model()
    with publishing(bucket) as publisher:
        publisher.publish(weights)
        publisher.flush(PATIENCE)
        bucket.plan, asked = down()
        for step in (1, 2, 3):
            edit(weights, step)
            publisher.publish(weights)
            assert asked.wait(PATIENCE)
        bucket.plan = never
        publisher.flush(PATIENCE)
    with pytest.raises(Gap, match=r"version 2 went into version 3 .*; there are 1 and 3"):
        updates(bucket, until=2)


def test_a_subscriber_sees_what_is_published_later(chain):
    bucket, expected = chain
    with Subscriber(bucket) as subscriber:
        here = subscriber.latest()
        assert list(subscriber.updates(here)) == []
        publish_all(bucket, model(9))
        (update,) = subscriber.updates(here)
        assert (update.parent, update.position.version) == (here, 4)
        assert equal(expected[3] + update.delta, served(model(9)))
        assert subscriber.latest() == update.position


def test_a_position_is_found_by_the_root_of_its_weights(chain):
    bucket, expected = chain
    with Subscriber(bucket) as subscriber:
        for version in range(4):
            found = subscriber.position_of(root(subscriber.run.table, digest(expected[version])))
            assert found == Position(subscriber.run.run, version, found.root)
        assert subscriber.position_of("0" * 64) is None


def test_weights_that_returned_to_an_earlier_version_stand_at_the_newest_such(chain):
    bucket, _ = chain
    first = model(20)
    publish_all(bucket, first, model(21), first)
    with Subscriber(bucket) as subscriber:
        assert subscriber.position_of(root(subscriber.run.table, digest(served(first)))).version == 6


def test_digests_of_any_version_are_known_without_its_payloads(chain):
    bucket, expected = chain
    bucket.delete(*(stat.key for stat in bucket.list("runs/") if "/deltas/" in stat.key or "/anchors/" in stat.key))
    with Subscriber(bucket) as subscriber:
        for version in range(4):
            assert subscriber.digests_at(version) == digest(expected[version])
        with pytest.raises(Gap):
            subscriber.digests_at(4)


def test_an_empty_bucket_has_nothing_published():
    with Subscriber(fresh()) as subscriber:
        for ask in (subscriber.latest, subscriber.commits, lambda: next(subscriber.updates()), lambda: subscriber.run):
            with pytest.raises(NotFound, match="nothing is published there yet"):
                ask()


def test_a_run_announced_without_a_commit_says_so(chain):
    bucket, _ = chain
    bucket.delete(*(commit_key(commit.run, commit.version) for commit in commits(bucket)))
    with Subscriber(bucket) as subscriber, pytest.raises(NotFound, match="no commits yet"):
        subscriber.latest()


def test_a_stale_head_hides_no_commit(chain):
    bucket, expected = chain
    old = position(bucket, 0)
    bucket.put(HEAD_KEY, write(Head(old.run, 0, commit_key(old.run, 0))))
    assert [update.position.version for update in updates(bucket)] == [0, 1, 2, 3]
    assert equal(read_weights(bucket), expected[3])


def test_a_missing_head_is_no_obstacle_to_one_who_knows_the_run(chain):
    bucket, _ = chain
    with Subscriber(bucket) as subscriber:
        here = subscriber.latest()
        bucket.delete(HEAD_KEY)
        assert subscriber.latest() == here
    with Subscriber(bucket) as newcomer:  # the only run there is
        assert newcomer.latest() == here
    with Subscriber(fresh()) as early, pytest.raises(NotFound, match=HEAD_KEY):
        early.latest()


def test_a_bucket_that_moves_to_another_run_is_not_followed(chain):
    bucket, _ = chain
    other = fresh()
    publish_all(other, model(7))
    with Subscriber(bucket) as subscriber:
        subscriber.latest()
        for stat in other.list():
            bucket.put(stat.key, other.get(stat.key, limit=1 << 20))
        with pytest.raises(OtherRun, match="does not continue it"):
            subscriber.latest()
        with pytest.raises(OtherRun):
            list(subscriber.updates())
    assert equal(read_weights(bucket), served(model(7)))


def test_a_position_that_is_not_on_the_chain_is_refused(chain):
    bucket, _ = chain
    here = position(bucket, 2)
    with pytest.raises(OtherRun, match="of another run"):
        updates(bucket, msgspec.structs.replace(here, run="f" * 16))
    with pytest.raises(Gap, match="no commit 17 to continue from"):
        updates(bucket, msgspec.structs.replace(here, version=17))
    with pytest.raises(Forked, match="these weights have root 000000"):
        updates(bucket, msgspec.structs.replace(here, root="0" * 64))


def test_a_missing_commit_is_a_gap(chain):
    bucket, _ = chain
    bucket.delete(commit_key(position(bucket, 0).run, 2))
    with pytest.raises(Gap, match=r"commit .*:3 continues version 2, but the one before it is 1"):
        updates(bucket)


def test_a_missing_anchor_commit_is_a_gap(chain):
    bucket, _ = chain
    bucket.delete(commit_key(position(bucket, 0).run, 0))
    with pytest.raises(Gap, match="no anchor before it"):
        updates(bucket)


@pytest.mark.parametrize("version", [0, 2])
def test_a_missing_payload_is_named(chain, version):
    bucket, _ = chain
    key = payload_key(bucket, version)
    bucket.delete(key)
    with pytest.raises(NotFound, match=key):
        updates(bucket)


def test_the_updates_before_a_damaged_one_still_come(chain):
    bucket, _ = chain
    bucket.delete(payload_key(bucket, 2))
    with Subscriber(bucket) as subscriber:
        stream = subscriber.updates()
        assert [next(stream).position.version, next(stream).position.version] == [0, 1]
        with pytest.raises(NotFound):
            next(stream)


def test_a_head_that_names_a_run_that_is_not_there_is_not_found(chain):
    bucket, _ = chain
    bucket.delete(run_key(position(bucket, 0).run))
    with Subscriber(bucket) as subscriber, pytest.raises(NotFound, match=r"run\.json"):
        subscriber.latest()


def test_junk_beside_the_commits_is_not_read(chain):
    bucket, _ = chain
    run = position(bucket, 0).run
    for name in ("000002.json.bak", "9.json", "notes.txt"):
        bucket.put(f"runs/{run}/commits/{name}", b"junk")
    assert len(updates(bucket)) == 4


def test_a_base_elsewhere_is_given_and_a_missing_one_asked_for(tmp_path):
    bucket, weights = fresh(), model()
    (tmp_path / "here").mkdir()
    checkpoint.write(tmp_path / "here", table(served(weights)), served(weights))
    edit(weights, 1)
    publish_all(bucket, weights, base=tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    with pytest.raises(NotFound, match="pass base=, a folder that holds it"):
        updates(bucket)
    with Subscriber(bucket, base=tmp_path / "nowhere") as subscriber, pytest.raises(NotFound, match="nowhere"):
        next(subscriber.updates())
    assert equal(read_weights(bucket, base=tmp_path / "there"), served(weights))


def test_anchor_files_are_fetched_once_and_removed_on_close(chain, tmp_path, monkeypatch):
    bucket, expected = chain
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Subscriber(bucket) as subscriber:
        first = next(subscriber.updates())
        bucket.delete(payload_key(bucket, 0))
        again = next(subscriber.updates())
        assert equal(dict(first.anchor), dict(again.anchor))
        assert equal(dict(again.anchor), expected[0])
        (file,) = subscriber.anchor_files()
        assert file.is_relative_to(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_subscriber_writes_nothing(chain):
    bucket, _ = chain
    before = [(stat.key, stat.tag) for stat in bucket.list()]
    updates(bucket)
    assert [(stat.key, stat.tag) for stat in bucket.list()] == before


def test_watching_tells_of_the_next_commit_by_the_tag_of_head(chain):
    bucket, _ = chain
    with Subscriber(bucket) as subscriber:
        seen = subscriber.watch(timeout=0)
        assert subscriber.watch(timeout=0, tag=seen.tag) is None
        publish_all(bucket, model(9))
        assert subscriber.watch(timeout=0, tag=seen.tag).tag != seen.tag


def test_fetching_and_applying_an_update_costs_one_delta():
    """8 tensors of 250,000 bf16 elements, 4 MB; 1 % changes: a delta is 200 kB in memory, a twentieth of the model."""
    rng = np.random.default_rng(0)
    steps = [{f"layer.{n}": Bits("BF16", (250_000,), rng.integers(0, 1 << 16, 250_000, np.uint16)) for n in range(8)}]
    for _ in range(2):
        steps.append({name: bits.copy() for name, bits in steps[-1].items()})
        for bits in steps[-1].values():
            bits.data[::100] += 1
    bucket, held = fresh(), steps[0]
    publish_all(bucket, *steps)
    with Subscriber(bucket) as subscriber:
        stream = subscriber.updates(position(bucket, 0))
        next(stream).delta.apply_(held)  # compiles what applies
        tracemalloc.start()
        update = next(stream)
        update.delta.apply_(held)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert equal(held, steps[2])
    allowed = update.delta.nbytes + 3 * update.wire_bytes + 100_000
    assert peak < allowed, f"{peak:,} bytes at the peak; the delta is {update.delta.nbytes:,}, allowed are {allowed:,}"


@pytest.mark.parametrize("read", [lambda reader: list(reader.updates()), lambda reader: reader.change(None, 3)])
def test_a_run_record_that_was_damaged_on_its_way_is_read_again_by_a_reader_that_lives_on(read):
    bucket, steps = chain_of_four()
    get, left = bucket.get, [1]

    class Damaged(Counting):
        def get(self, key, *, limit):
            data = get(key, limit=limit)
            if key.endswith("run.json") and left[0]:
                left[0] -= 1
                return data.replace(b"layer.0.bias", b"layer.0.bjas")
            return data

    with Subscriber(Damaged(bucket)) as subscriber:
        with pytest.raises(DeltaWireError):
            read(subscriber)
        subscriber.refresh()  # as a follower, a worker and a compactor do after what they could not use
        read(subscriber)
        assert subscriber.run.table == table(steps[0])
