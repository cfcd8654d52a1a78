"""Retention: references go first, nobody who stands at or above the floor misses anything."""

import secrets
from contextlib import suppress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import commits, edit, fresh, model, publish_all, publishing, read_weights, served

from deltawire import Subscriber, materialize
from deltawire.buckets import Stat
from deltawire.buckets.faulty import Faulty, at
from deltawire.buckets.forwarding import Forwarding
from deltawire.buckets.wrappers import Counting
from deltawire.errors import FormatError, Gap, Unavailable
from deltawire.format.checkpoint import Checkpoint
from deltawire.read.mirror import MARKER
from deltawire.read.naming import name_version, version_named
from deltawire.runlog import heartbeats, log, pruning, signing
from deltawire.runlog.heartbeats import Heartbeat
from deltawire.runlog.invariants import every_version_is_reachable
from deltawire.runlog.keys import HEAD_KEY, commit_key, derived_key
from deltawire.runlog.records import Derived, Head, hash_of, read, signed, write
from deltawire.runlog.tags import Tag, delete_tag, read_tags
from deltawire.upkeep import retention
from deltawire.upkeep.compactor import Compactor
from deltawire.upkeep.retention import Policy, carry_out, find_prunable, prunable
from deltawire.upkeep.verify import verify
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


def tagged(bucket, **versions):
    with Subscriber(bucket) as subscriber:
        for name, version in versions.items():
            name_version(subscriber, str(version), name)


def require_sound(bucket, run, steps, tmp_path):
    """Every tagged version and all of the newest part read, by every verb that reads; nothing else is claimed."""
    stored = {version: log.load_commit(bucket, run, version).record for version in log.list_versions(bucket, run)}
    with Subscriber(bucket) as subscriber:
        anchors = [edge.end for edge in subscriber.chain.anchors()]
        part = [commit.version for commit in subscriber.commits()]
    assert every_version_is_reachable({version: commit.parent for version, commit in stored.items()}, anchors) is None
    assert (part[-1], part) == (19, [*range(part[0], 20)])
    checked = verify(bucket)
    assert checked.position.version == 19
    below = {tag.version for tag in read_tags(bucket, run) if tag.version < part[0]}
    assert {*checked.tagged} == below
    for version in {*part, *(tag.version for tag in read_tags(bucket, run))}:
        out = tmp_path / f"{version} {secrets.token_hex(4)}"
        materialize(bucket, out, version)
        assert equal(Checkpoint(out), steps[version])


def test_a_tag_keeps_its_version_and_what_leads_to_it_and_the_rest_goes(compacted, tmp_path):
    bucket, run, steps = compacted
    tagged(bucket, early=10, first=0)
    found = find_prunable(bucket, run, SOON)
    assert (found.floor, found.tagged) == (19, ((0, 0), (8, 10)))
    carry_out(bucket, found)
    assert log.list_versions(bucket, run) == [0, 8, 9, 10, 19]
    assert not [stat.key for stat in bucket.list(f"runs/{run}/") if "step_000009-" in stat.key and "anchor" in stat.key]
    require_sound(bucket, run, steps, tmp_path)
    with Subscriber(bucket) as subscriber:
        assert version_named(subscriber, "early") == 10
        with pytest.raises(Gap, match="version 12 is pruned; a tag keeps 10"):
            subscriber.position_at(12)
        back = subscriber.change(subscriber.latest(), 10)
        assert back.anchor_position.version == 8
        delete_tag(bucket, run, "early")
    assert find_prunable(bucket, run, SOON).tagged == ((0, 0),)
    with publishing(bucket) as publisher, Compactor(bucket, tmp_path / "m") as compactor:
        for step in range(20, 26):
            publisher.publish(model(step))
            publisher.flush(30)
        assert {report.parent for report in compactor.step()} >= {20}, "what is folded begins above the gap"
    carry_out(bucket, find_prunable(bucket, run, SOON))
    assert log.list_versions(bucket, run)[0] == 0 and 8 not in log.list_versions(bucket, run)


@pytest.mark.parametrize("name", [17, 18])
def test_a_tag_just_below_what_stays_joins_it(compacted, tmp_path, name):
    bucket, run, steps = compacted
    tagged(bucket, late=name, early=15)
    found = find_prunable(bucket, run, SOON)
    assert (found.floor, found.tagged) == ((8, ()) if name == 18 else (19, ((8, 17),)))
    carry_out(bucket, found)
    require_sound(bucket, run, steps, tmp_path)


def test_what_a_broken_off_prune_announced_ends_with_the_next_that_finds_nothing(compacted):
    bucket, run, _ = compacted
    pruning.announce(bucket, run, 19, ())
    found = find_prunable(bucket, run, Policy(hours=24.0))
    assert not found.keys
    assert not name_it(bucket, move=False)
    carry_out(bucket, found)
    assert pruning.announced(bucket, run) is None
    assert name_it(bucket, move=False)


def test_verify_holds_one_tagged_version_at_a_time(compacted, tmp_path, monkeypatch):
    bucket, run, _ = compacted
    tagged(bucket, early=10, first=0)
    carry_out(bucket, find_prunable(bucket, run, SOON))
    held, temporary = [], tmp_path / "temporary"
    temporary.mkdir()

    def watched(bucket, out, *given, **options):
        held.append(len([*temporary.rglob(MARKER)]))
        return materialize(bucket, out, *given, **options)

    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setattr("deltawire.upkeep.verify.materialize", watched)
    assert verify(bucket).tagged == (0, 10)
    assert held == [0, 0]


def test_a_tag_of_a_version_that_is_not_there_keeps_nothing(compacted):
    bucket, run, _ = compacted
    bucket.put(f"runs/{run}/tags/odd.json", msgspec.json.encode(Tag(run, "odd", 77, "0" * 64, 0.0)))
    assert find_prunable(bucket, run, SOON).floor == 19


class Between(Forwarding):
    """A bucket of which something else is done before call number `turn`."""

    def __init__(self, bucket, turn, act):
        super().__init__(bucket)
        self.calls, self._turn, self._act = 0, turn, act

    def _call(self, verb, key):
        self.calls += 1
        if self.calls == self._turn:
            self._act()
        return verb()


def copied(bucket):
    other = fresh()
    for stat in bucket.list(""):
        other.put(stat.key, bucket.get(stat.key, limit=1 << 24))
    return other


def name_it(bucket, move):
    """Tag version 10, which would go, and say whether that is done."""
    with Subscriber(bucket) as subscriber:
        try:
            name_version(subscriber, "10", "best", move=move)
        except Gap:
            return False
    return True


def prune_it(bucket, run):
    with suppress(Unavailable):
        carry_out(bucket, find_prunable(bucket, run, SOON))


def steps_of(act, bucket):
    """How many calls something makes."""
    counting = Between(copied(bucket), 0, lambda: None)
    act(counting)
    return counting.calls


@pytest.mark.parametrize("inner", ["tag", "prune"])
@pytest.mark.parametrize("move", [False, True])
def test_a_tag_made_or_moved_while_a_prune_goes_on_is_refused_or_keeps_its_version(compacted, tmp_path, inner, move):
    """One of the two is done between any two calls of the other."""
    bucket, run, steps = compacted
    if move:
        tagged(bucket, best=3)
    outer = (lambda on: prune_it(on, run)) if inner == "tag" else (lambda on: name_it(on, move))
    done = set()
    for turn in range(1, steps_of(outer, bucket) + 1):
        here, named = copied(bucket), []
        if inner == "tag":
            prune_it(Between(here, turn, lambda here=here, named=named: named.append(name_it(here, move))), run)
        else:
            named.append(name_it(Between(here, turn, lambda here=here: prune_it(here, run)), move))
        tags = {tag.name: tag.version for tag in read_tags(here, run)}
        assert tags == ({"best": 10} if named == [True] else {"best": 3} if move else {})
        for version in tags.values():
            materialize(here, out := tmp_path / f"{turn}", version)
            assert equal(Checkpoint(out), steps[version])
        prune_it(here, run)
        require_sound(here, run, steps, tmp_path / f"after {turn}")
        done.update(named)
    assert done == {False, True}, "both ways to end were seen"


def test_a_prune_around_tags_that_is_cut_off_anywhere_reads_and_is_finished_by_the_next(compacted):
    bucket, run, steps = compacted
    tagged(bucket, early=10)
    keys = find_prunable(bucket, run, SOON).keys
    for cut in range(len(keys)):
        here = copied(bucket)
        here.delete(*keys[:cut])
        with Subscriber(here) as subscriber:
            assert subscriber.commits()[-1].version == 19
        for version in (10, 19):
            assert equal(read_weights(here, version), steps[version])
        for left in (True, False):
            found = find_prunable(here, run, SOON)
            assert (found.floor, found.tagged, bool(found.keys)) == (19, ((8, 10),), left)
            carry_out(here, found)
        assert log.list_versions(here, run) == [8, 9, 10, 19]


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
