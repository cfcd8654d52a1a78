"""Folds and anchors: what a late reader fetches, and that it is right."""

import queue
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import edit, fresh, model, publish_all, publishing, read_weights, replace_commit, served

from deltawire import Subscriber, digest, verify
from deltawire.buckets.faulty import Faulty, at
from deltawire.errors import BadDigest, BadSignature, Unavailable
from deltawire.runlog import signing
from deltawire.runlog.records import Derived, read, signed, write
from deltawire.upkeep.background import BackgroundCompactor
from deltawire.upkeep.compactor import Compactor
from deltawire.upkeep.inventory import due
from deltawire.weights.digest import root
from deltawire.weights.tensors import equal


def chain(length, **options):
    bucket, weights, steps = fresh(), model(), []
    with publishing(bucket, **options) as publisher:
        for step in range(length):
            edit(weights, step, share=0.02)
            publisher.publish(weights)
            publisher.flush(30)
            steps.append(served(weights))
    return bucket, steps


def reached(bucket, since, version):
    """What a reader gets that stands on `since` with those weights (or on nothing)."""
    start, weights = since
    with Subscriber(bucket) as subscriber:
        here = None if start is None else subscriber.chain.commit(start).record.position
        change = subscriber.change(here, version)
        held = dict(weights) if change.anchor is None else {name: change.anchor[name].copy() for name in weights}
        held = held + change.delta
        assert root(subscriber.run.table, digest(held)) == change.position.root
    return held, change


def test_folds_of_every_level_and_an_anchor_lead_to_the_same_weights(tmp_path):
    bucket, steps = chain(20)
    with Compactor(bucket, tmp_path / "m", anchors=16) as compactor:
        reports = compactor.step()
        assert compactor.step() == []
    spans = [(report.parent, report.version) for report in reports]
    assert spans == [(0, 4), (4, 8), (8, 12), (12, 16), (0, 16), (None, 19)]
    assert all(report.wire_bytes <= report.replaced_bytes for report in reports[:-1])
    for start, target in [(0, 16), (3, 18), (18, 3), (19, 0), (None, 17), (None, 19)]:
        assert equal(reached(bucket, (start, steps[start or 0]), target)[0], steps[target])
    assert reached(bucket, (0, steps[0]), 16)[1].payloads == 1
    assert equal(read_weights(bucket), steps[19])


def test_a_new_process_goes_on_with_the_mirror_it_finds(tmp_path):
    bucket, steps = chain(6)
    with Compactor(bucket, tmp_path / "m", anchors="never") as compactor:
        compactor.step()
    publish_all(bucket, model(7), model(8), model(9))
    with Compactor(bucket, tmp_path / "m", anchors="never") as compactor:
        assert [(report.parent, report.version) for report in compactor.step()] == [(4, 8)]
    held, change = reached(bucket, (0, steps[0]), 8)
    assert equal(held, served(model(9)))
    assert change.payloads == 2


def test_another_compactor_writes_the_very_same_bytes(tmp_path):
    bucket, _ = chain(6)
    with Compactor(bucket, tmp_path / "one", anchors=1) as compactor:
        compactor.step()
    first = {stat.key: stat.tag for stat in bucket.list("runs/")}
    for key in [key for key in first if "/derived/" in key]:
        bucket.delete(key)
    with Compactor(bucket, tmp_path / "two", anchors=1) as compactor:
        compactor.step()
    assert first.keys() == {stat.key for stat in bucket.list("runs/")}


def test_the_adaptive_cadence_writes_an_anchor_when_catching_up_costs_more(tmp_path):
    bucket, weights = fresh(), model()
    with publishing(bucket) as publisher, Compactor(bucket, tmp_path / "m", levels=()) as compactor:
        anchors = []
        for step in range(30):
            edit(weights, step, share=0.2)
            publisher.publish(weights)
            publisher.flush(30)
            anchors += [report.version for report in compactor.step()]
    assert anchors
    assert len(anchors) < 15
    with Subscriber(bucket) as subscriber:
        change = subscriber.change(None, 29)
        assert change.anchor_position.version == anchors[-1]


def test_a_chain_that_does_not_lead_where_it_says_is_not_folded(tmp_path):
    bucket, _ = chain(6)
    replace_commit(bucket, 2, lambda commit: msgspec.structs.replace(commit, root="0" * 64))
    replace_commit(bucket, 4, lambda commit: msgspec.structs.replace(commit, root="0" * 64))
    with Compactor(bucket, tmp_path / "m") as compactor, pytest.raises(BadDigest):
        compactor.step()
    assert not [stat for stat in bucket.list("runs/") if "/derived/" in stat.key]


def test_a_delegated_key_signs_what_it_derives_and_another_is_refused(tmp_path):
    trainer, clerk, stranger = (signing.generate_key(tmp_path / name) for name in ("trainer", "clerk", "stranger"))
    bucket, _ = chain(6, signing_key=tmp_path / "trainer", compactors=[clerk.public])
    trusted = [trainer.public]
    with Compactor(bucket, tmp_path / "m", trusted=trusted, signing_key=tmp_path / "clerk") as compactor:
        compactor.step()
    with Subscriber(bucket, trusted=trusted) as subscriber:
        change = subscriber.change(subscriber.chain.commit(0).record.position, 4)
        assert change.payloads == 1
    (key,) = [stat.key for stat in bucket.list("runs/") if "/derived/" in stat.key]
    record = read(Derived, bucket.get(key, limit=1 << 20), where="")
    bucket.put(key, write(signed(msgspec.structs.replace(record, signer=None, signature=None), stranger)))
    for key_file in (None, tmp_path / "stranger"):
        told = pytest.raises(BadSignature, match="compact it with one of these keys")
        with Compactor(bucket, tmp_path / "m", signing_key=key_file) as compactor, told:
            compactor.step()
    with Subscriber(bucket, trusted=trusted) as subscriber:  # a stranger's fold stops nobody, and is not used
        assert subscriber.change(subscriber.chain.commit(0).record.position, 4).payloads == 4
    with Compactor(bucket, tmp_path / "m", trusted=trusted, signing_key=tmp_path / "clerk") as compactor:
        assert [(report.parent, report.version) for report in compactor.step()] == [(0, 4)]
    with Subscriber(bucket, trusted=trusted) as subscriber:
        assert subscriber.change(subscriber.chain.commit(0).record.position, 4).payloads == 1


def test_a_fold_of_other_commits_is_passed_over(tmp_path):
    bucket, steps = chain(6)
    with Compactor(bucket, tmp_path / "m", anchors="never") as compactor:
        compactor.step()
    assert reached(bucket, (0, steps[0]), 5)[1].payloads == 2
    (key,) = [stat.key for stat in bucket.list("runs/") if "/derived/" in stat.key]
    record = read(Derived, bucket.get(key, limit=1 << 20), where="")
    for lie in ({"commit_hash": "0" * 64}, {"parent_hash": "0" * 64}, {"payloads": ()}, {"run": "0" * 16}):
        bucket.put(key, write(msgspec.structs.replace(record, **lie)))
        for target in (4, 5):
            held, change = reached(bucket, (0, steps[0]), target)
            assert equal(held, steps[target])
            assert change.payloads == target
    bucket.put(key, write(record))
    bucket.put(f"runs/{record.run}/{record.payloads[0].key}", b"junk")
    assert equal(reached(bucket, (0, steps[0]), 5)[0], steps[5])


def rot(folder):
    """Flip one bit of the weights of a mirror, as a disk may."""
    path = next(folder.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    with path.open("r+b") as file:
        file.write(data)


@pytest.mark.parametrize("reopened", [False, True], ids=["while it is open", "between two processes"])
@pytest.mark.parametrize("anchors", [1, "never"])
def test_a_mirror_that_rotted_makes_no_wrong_anchor_and_is_made_anew(tmp_path, anchors, reopened):
    bucket, weights = fresh(), model()
    with publishing(bucket) as publisher, Compactor(bucket, tmp_path / "m", anchors=anchors) as compactor:
        for step in range(8):
            edit(weights, step, share=0.9)
            publisher.publish(weights)
            publisher.flush(30)
            if step == 4:
                compactor.step()
        if not reopened:
            rot(tmp_path / "m")
            compactor.step()
    if reopened:
        rot(tmp_path / "m")
    publish_all(bucket, weights)
    with Compactor(bucket, tmp_path / "m", anchors=anchors) as compactor:
        compactor.step()
        assert compactor._copy.is_sound()
    assert equal(reached(bucket, (None, weights), 8)[0], served(weights))
    assert verify(bucket).position.version == 8


@given(st.sets(st.integers(0, 300), min_size=1), st.sampled_from([4, 16, 64]))
def test_folds_that_are_due_are_apart_and_bounded_by_committed_versions(numbers, level):
    versions = sorted(numbers)
    folds = due(versions, level)
    assert all(start in numbers and end in numbers and start < end for start, end in folds)
    assert all(end <= start for (_, end), (start, _) in pairwise(folds))
    assert all(len(numbers & set(range(start + 1, end + 1))) > 1 for start, end in folds)


def test_consecutive_versions_are_folded_between_multiples():
    assert due(list(range(10)), 4) == [(0, 4), (4, 8)]
    assert due(list(range(3, 14)), 4) == [(4, 8), (8, 12)]
    assert due([0, 3, 5, 6, 9], 4) == [(3, 6)]
    assert due([], 4) == []


def test_tending_compacts_beside_whoever_wakes_it_and_tries_again_what_failed(tmp_path):
    bucket, _ = chain(5)
    faulty, told = Faulty(bucket, at("put_new", "folds/", "fail before")), queue.Queue()
    compactor = Compactor(faulty, tmp_path / "m", anchors="never")
    with BackgroundCompactor(compactor, on_report=told.put, on_problem=told.put) as compacting:
        compacting.wake()
        assert isinstance(told.get(timeout=90), Unavailable)
        compacting.wake()
        report = told.get(timeout=90)
    assert (report.parent, report.version) == (0, 4)
    assert told.empty()
