"""Retention: references go first, nobody who stands at or above the floor misses anything."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import commits, edit, fresh, model, publish_all, publishing, read_weights, served

from deltawire import Subscriber, materialize
from deltawire.buckets import Stat
from deltawire.buckets.faulty import Faulty, at
from deltawire.buckets.wrappers import Counting
from deltawire.errors import FormatError, Gap
from deltawire.runlog import heartbeats, log, signing
from deltawire.runlog.heartbeats import Heartbeat
from deltawire.runlog.keys import HEAD_KEY, commit_key, derived_key
from deltawire.runlog.records import Derived, Head, hash_of, read, signed, write
from deltawire.upkeep import retention
from deltawire.upkeep.compactor import Compactor
from deltawire.upkeep.retention import Policy, carry_out, find_prunable, prunable
from deltawire.weights.tensors import equal

SOON = Policy(anchors=1, hours=-1.0)
"""keep no commit for its age"""


@pytest.fixture
def compacted(tmp_path):
    """Versions 0 to 19 with folds, and anchors at 8, 16 and 19."""
    bucket, weights, steps = fresh(), model(), []
    with publishing(bucket) as publisher, Compactor(bucket, tmp_path / "m", anchors=8) as compactor:
        for step in range(20):
            edit(weights, step, share=0.02)
            publisher.publish(weights)
            publisher.flush(30)
            steps.append(served(weights))
            if step in (8, 16):
                compactor.step()
    with Compactor(bucket, tmp_path / "m", anchors=1) as compactor:
        compactor.step()
    with Subscriber(bucket) as subscriber:
        return bucket, subscriber.run.run, steps


def versions(bucket):
    with Subscriber(bucket) as subscriber:
        return subscriber.chain.versions()


def test_what_is_below_the_newest_anchors_goes_and_the_rest_still_reads(compacted, tmp_path):
    bucket, run, steps = compacted
    first = find_prunable(bucket, run, Policy(anchors=2, hours=-1.0))
    assert (first.floor, first.reason) == (16, "the newest 2 anchors")
    assert versions(bucket) == list(range(20))  # planning changes nothing
    carry_out(bucket, first)
    assert versions(bucket) == [16, 17, 18, 19]
    assert find_prunable(bucket, run, Policy(anchors=2, hours=-1.0)).keys == ()
    assert equal(read_weights(bucket, 17), steps[17])
    assert equal(read_weights(bucket), steps[19])
    assert materialize(bucket, tmp_path / "out").position.version == 19
    with Subscriber(bucket) as subscriber, pytest.raises(Gap, match="version 3 is pruned; committed are 16 to 19"):
        subscriber.digests_at(3)
    with Subscriber(bucket) as subscriber:
        assert [commit.version for commit in subscriber.commits()] == [16, 17, 18, 19]


def test_a_trainer_continues_a_pruned_run(compacted):
    bucket, run, _ = compacted
    carry_out(bucket, find_prunable(bucket, run, SOON))
    with publishing(bucket) as publisher:
        publisher.publish(model(5))
        assert publisher.flush(30).version == 20
    assert equal(read_weights(bucket), served(model(5)))


@pytest.mark.parametrize("beat", [Heartbeat("a", None, 10), Heartbeat("a", None, 19, need=9)])
def test_what_an_active_replica_needs_stays(compacted, beat):
    bucket, run, _ = compacted
    heartbeats.beat(bucket, msgspec.structs.replace(beat, run=run))
    found = find_prunable(bucket, run, SOON)
    assert (found.floor, found.reason) == (8, "replica a")


def test_a_replica_that_fell_silent_or_follows_another_run_keeps_nothing(compacted):
    bucket, run, _ = compacted
    heartbeats.beat(bucket, Heartbeat("elsewhere", "f" * 16, 1))
    heartbeats.beat(bucket, Heartbeat("silent", run, 1))
    assert find_prunable(bucket, run, Policy(1, -1.0, replica_hours=-1.0)).floor == 19
    assert find_prunable(bucket, run, SOON).reason == "replica silent"


def test_what_was_committed_lately_stays(compacted):
    bucket, run, _ = compacted
    found = find_prunable(bucket, run, Policy(anchors=1, hours=24))
    assert (found.floor, found.keys) == (0, ())


@pytest.mark.parametrize("share", [0.1, 0.4, 0.6, 0.9])
def test_an_interrupted_prune_reads_at_every_moment_and_is_finished_by_the_next(compacted, share):
    bucket, run, steps = compacted
    found = find_prunable(bucket, run, SOON)
    bucket.delete(*found.keys[: int(share * len(found.keys))])
    assert equal(read_weights(bucket), steps[19])
    with Subscriber(bucket) as subscriber:
        change = subscriber.change(None, 19)
        assert change.anchor_position.version == 19
    carry_out(bucket, find_prunable(bucket, run, SOON))
    assert versions(bucket) == [19]
    assert equal(read_weights(bucket), steps[19])


def test_payloads_go_after_everything_that_refers_to_them(compacted):
    bucket, run, _ = compacted
    kinds = [key.split("/")[2] for key in find_prunable(bucket, run, SOON).keys]
    last_reference = max(number for number, kind in enumerate(kinds) if kind in ("commits", "derived"))
    assert min(number for number, kind in enumerate(kinds) if kind not in ("commits", "derived")) > last_reference


def stats(length, anchors, times):
    run, names = "0" * 16, [f"commits/{n:06d}.json" for n in range(length)]
    names += [f"deltas/step_{n:06d}-0123456789ab.safetensors" for n in range(1, length)]
    names += [f"derived/anchor-{n:06d}-0123456789ab.json" for n in anchors]
    names += [f"anchors/step_{n:06d}-0123456789ab/model.safetensors" for n in anchors]
    return [Stat(f"runs/{run}/{name}", 1, "", times(n)) for n, name in enumerate(names)]


@given(st.integers(1, 40), st.sets(st.integers(0, 39)), st.integers(1, 4), st.lists(st.integers(0, 39)), st.data())
def test_nothing_at_or_above_what_is_wanted_goes(length, anchors, keep, replicas, data):
    anchors = {version for version in anchors if version < length}
    listed = stats(length, anchors, lambda n: data.draw(st.floats(-1e9, 1e10)))
    beats = [(Stat("x", 1, "", 1e10), Heartbeat(f"x{n}", "0" * 16, version)) for n, version in enumerate(replicas)]
    found = prunable(listed, "0" * 16, beats, Policy(keep, hours=-1e9))
    starts = sorted(anchors | {0})
    assert found.floor in starts
    assert found.floor <= min([*replicas, starts[-keep:][0]])
    commits = [key for key in found.keys if "/commits/" in key]
    assert len(commits) == found.floor
    assert not [key for key in found.keys if "deltas" in key and int(key.split("step_")[1][:6]) > found.floor]


def test_heartbeats_are_read_as_hints(compacted):
    bucket, run, _ = compacted
    bucket.put("replicas/junk.json", b"\xff not a record")
    bucket.put("replicas/huge.json", b" " * (heartbeats.MAX_HEARTBEAT + 1))
    heartbeats.beat(bucket, Heartbeat("b", run, 3, lag=2, error="x"))
    assert [beat for _, beat in heartbeats.read_all(bucket)] == [Heartbeat("b", run, 3, lag=2, error="x")]
    with pytest.raises(FormatError, match="replica name"):
        heartbeats.beat(bucket, Heartbeat("../b"))
    assert retention.find_prunable(bucket, run, SOON).reason == "replica b"


@pytest.mark.parametrize("said", [{"version": -1}, {"version": 19, "need": -5}, {"version": 19, "staged": -1}])
def test_a_heartbeat_of_a_negative_version_is_none_and_keeps_nothing(compacted, said):
    bucket, run, _ = compacted
    bucket.put("replicas/odd.json", msgspec.json.encode({"replica": "odd", "run": run, **said}))
    assert heartbeats.read_all(bucket) == []
    found = find_prunable(bucket, run, SOON)
    assert (found.floor, found.reason) == (19, "the newest 1 anchors")


def record_keys(bucket, kind):
    return [stat.key for stat in bucket.list("runs/") if f"/derived/{kind}-" in stat.key]


def payload_of(bucket, version):
    return next(stat.key for stat in bucket.list("runs/") if f"/anchors/step_{version:06d}-" in stat.key)


def rotten(data):
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("how", ["gone", "rotten", "forged record", "junk record"])
def test_an_anchor_that_nobody_could_begin_at_keeps_the_one_before_it(compacted, tmp_path, how):
    bucket, run, steps = compacted
    if how == "gone":
        bucket.delete(payload_of(bucket, 19))
    elif how == "rotten":
        bucket.put(payload_of(bucket, 19), rotten(bucket.get(payload_of(bucket, 19), limit=1 << 20)))
    elif how == "forged record":
        key = record_keys(bucket, "anchor-000019")[0]
        record = read(Derived, bucket.get(key, limit=1 << 20), where="")
        bucket.put(key, write(msgspec.structs.replace(record, commit_hash="0" * 64)))
    else:
        bucket.put(f"runs/{run}/derived/anchor-000019-{0:012x}.json", b"{}")
        bucket.delete(*[key for key in record_keys(bucket, "anchor-000019") if not key.endswith(f"{0:012x}.json")])
    found = find_prunable(bucket, run, SOON)
    assert found.floor == 16
    assert "anchor-000019" in found.passed_over[0]
    carry_out(bucket, found)
    assert equal(read_weights(bucket), steps[19])
    assert materialize(bucket, tmp_path / "out").position.version == 19


def test_a_strangers_record_beside_a_sound_one_of_the_same_version_changes_nothing(compacted):
    bucket, run, steps = compacted
    bucket.put(f"runs/{run}/derived/anchor-000019-{0:012x}.json", b"{}")
    found = find_prunable(bucket, run, SOON)
    assert (found.floor, len(found.passed_over)) == (19, 1)
    carry_out(bucket, found)
    assert equal(read_weights(bucket), steps[19])


def test_a_stranger_cannot_make_a_signed_run_lean_on_an_anchor_of_theirs(tmp_path):
    key, stranger = (signing.generate_key(tmp_path / name) for name in ("key", "stranger"))
    bucket, weights = fresh(), model()
    with publishing(bucket, signing_key=tmp_path / "key") as publisher:
        for step in range(6):
            edit(weights, step)
            publisher.publish(weights)
            publisher.flush(30)
    with Compactor(bucket, tmp_path / "m", anchors=1, signing_key=tmp_path / "key") as compactor:
        compactor.step()
    (record_key,) = record_keys(bucket, "anchor")
    record = read(Derived, bucket.get(record_key, limit=1 << 20), where="")
    bucket.put(record_key, write(signed(msgspec.structs.replace(record, signer=None, signature=None), stranger)))
    for trusted in ((), [key.public]):
        found = find_prunable(bucket, record.run, SOON, trusted=trusted)
        assert (found.floor, found.keys) == (0, ())


def test_an_anchor_is_read_once_and_then_asked_for_its_tags_alone(compacted, tmp_path):
    bucket, run, _ = compacted
    memory, key = tmp_path / "memory" / "anchors.json", payload_of(bucket, 19)
    whole = bucket.stat(key).size
    first, second = Counting(bucket), Counting(bucket)
    for counting in (first, second):
        assert find_prunable(counting, run, SOON, memory=memory).floor == 19
    assert first.traffic.bytes_down - second.traffic.bytes_down == whole
    bucket.put(key, rotten(bucket.get(key, limit=1 << 20)))
    assert find_prunable(bucket, run, SOON, memory=memory).floor == 16
    memory.write_bytes(b"junk")
    assert find_prunable(bucket, run, SOON, memory=memory).floor == 16


NOW = 1_800_000_000.0
DAY = 86_400.0


@pytest.mark.parametrize(
    ("ahead", "stamped", "written"),
    [
        (26 * 3600.0, NOW, None),
        (26 * 3600.0, NOW - DAY, NOW - 10),
        (-26 * 3600.0, NOW, NOW - DAY),
        (400 * DAY, NOW, NOW),
    ],
)
def test_no_clock_that_is_wrong_makes_an_active_replica_silent(ahead, stamped, written):
    """One heartbeat's file is from another time, by a host or a mount with a wrong clock; another replica needs 3."""
    listed = stats(10, {4, 8}, lambda n: NOW - 2 * DAY)
    beats = [
        (Stat("replicas/wrong.json", 1, "", NOW + ahead), Heartbeat("wrong", "0" * 16, 9)),
        (Stat("replicas/right.json", 1, "", stamped), Heartbeat("right", "0" * 16, 3, at=written)),
    ]
    found = prunable(listed, "0" * 16, beats, Policy(1, hours=1.0), clock=lambda: NOW)
    assert (found.floor, found.reason) == (0, "replica right")


def test_a_replica_is_silent_once_both_the_store_and_its_own_word_are_old():
    listed = stats(10, {4, 8}, lambda n: NOW - 2 * DAY)
    beats = [(Stat("replicas/a.json", 1, "", NOW - DAY), Heartbeat("a", "0" * 16, 3, at=NOW - DAY))]
    beats += [(Stat("replicas/b.json", 1, "", NOW), Heartbeat("b", "0" * 16, 9, at=NOW))]
    assert prunable(listed, "0" * 16, beats, Policy(1, hours=1.0), clock=lambda: NOW).floor == 8


@pytest.mark.parametrize("late", [False, True], ids=["alone", "two commits of one version"])
def test_a_run_on_a_store_that_refuses_no_second_write_is_pruned_like_any_other(tmp_path, late):
    bucket, weights = Faulty(fresh(), lambda call: None), model()
    bucket.conditional_writes = False
    with publishing(bucket) as publisher:
        for step in range(6):
            edit(weights, step)
            publisher.publish(weights)
            publisher.flush(30)
    with Compactor(bucket, tmp_path / "m", anchors=5) as compactor:
        compactor.step()
    with Subscriber(bucket) as subscriber:
        second = subscriber.chain.commit(2).record
    if late:  # what another trainer wrote, which nobody continued
        other = write(msgspec.structs.replace(second, writer="elsewhere pid 7"))
        bucket.put(commit_key(second.run, 2, hash_of(other)), other)
    found = find_prunable(bucket, second.run, SOON)
    assert found.floor == 5
    carry_out(bucket, found)
    assert [version for version, _ in log.list_commits(bucket, second.run)] == [5]
    assert not [stat.key for stat in bucket.list("runs/") if "/deltas/" in stat.key]
    assert equal(read_weights(bucket), served(weights))


def test_an_anchor_that_borrows_the_files_of_an_older_version_is_not_leaned_on():
    bucket, weights = fresh(), model()
    publish_all(bucket, weights, weights)
    first, second = commits(bucket)
    with Subscriber(bucket) as subscriber:
        held, hash_of_second = subscriber.digests_at(1), subscriber.chain.commit(1).hash
    digests = {name: f"{value:016x}" for name, value in held.items()}
    record = Derived(
        run=first.run,
        version=1,
        parent=None,
        root=second.root,
        digests=digests,
        payloads=first.payloads,
        commit_hash=hash_of_second,
    )
    bucket.put(derived_key(first.run, None, 1, first.payloads), write(record))
    found = find_prunable(bucket, first.run, SOON)
    carry_out(bucket, found)
    assert (found.floor, found.keys) == (0, ())
    assert "older version" in found.passed_over[0]
    assert equal(read_weights(bucket), served(weights))
    with publishing(bucket) as publisher:
        assert publisher.position.version == 1


def test_the_commit_that_head_names_stays_when_its_writer_died_before_it_moved_head(compacted):
    bucket, run, steps = compacted
    head = log.read_head(bucket)
    bucket.put(HEAD_KEY, write(Head(run, 10, commit_key(run, 10))))
    found = find_prunable(bucket, run, SOON)
    assert (found.floor, found.reason) == (8, "HEAD.json")
    carry_out(bucket, found)
    assert equal(read_weights(bucket), steps[19])
    bucket.put(HEAD_KEY, write(head))
    assert find_prunable(bucket, run, SOON).floor == 19


def test_a_heartbeat_that_was_cut_short_on_its_way_keeps_what_its_replica_stands_on(compacted):
    bucket, run, _ = compacted
    heartbeats.beat(bucket, Heartbeat("a", run, 10))
    cut = Faulty(bucket, at("get", "replicas/", "truncate", times=2))
    assert find_prunable(cut, run, SOON).reason == "replica a"
    assert cut.injected["truncate"] == 2
