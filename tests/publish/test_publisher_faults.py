"""A captured change is never forgotten: failing stores, lost answers, killed trainers and second ones."""

import errno
import gc
import threading
import tracemalloc

import numpy as np
import pytest
from faults import Fault, Faulty, down, from_write, never, on_key
from hypothesis import given
from hypothesis import strategies as st
from runs import PATIENCE, commits, edit, fresh, model, publish_all, publishing, read_weights, served
from strategies import seeds

from deltawire import Publisher, materialize
from deltawire.buckets import faulty as schedules
from deltawire.errors import (
    AccessRefused,
    BadDigest,
    BucketError,
    Forked,
    FormatError,
    MissingTensor,
    Unavailable,
)
from deltawire.format.checkpoint import Checkpoint
from deltawire.runlog.keys import HEAD_KEY, commit_key
from deltawire.runlog.log import list_versions, read_head
from deltawire.weights.tensors import equal

pytestmark = pytest.mark.usefixtures("quick_retries")


def test_a_failed_upload_then_a_retry_publishes_the_same_change():
    bucket = Faulty(fresh())
    weights = model()
    with publishing(bucket) as pub:
        pub.publish(weights)
        pub.flush(timeout=PATIENCE)
        bucket.plan = on_key("deltas/", times=3)
        edit(weights, 1)
        pub.publish(weights)
        pub.flush(timeout=PATIENCE)
    sent = bucket.sent("deltas/")
    assert len(sent) == 4
    assert len(set(sent)) == 1
    assert equal(read_weights(bucket), served(weights))


@pytest.mark.parametrize("raised", [AttributeError("no request"), RuntimeError("reset"), ConnectionResetError("reset")])
@pytest.mark.parametrize("part", ["deltas/", "commits/000001", "HEAD"])
def test_an_untyped_error_of_a_store_is_tried_again(part, raised):
    """One of huggingface_hub's, met in outages, ended the uploader."""
    bucket, weights = Faulty(fresh()), model()
    with publishing(bucket) as pub:
        pub.publish(weights)
        pub.flush(timeout=PATIENCE)
        bucket.plan = on_key(part, times=3, error=raised)
        edit(weights, 1)
        pub.publish(weights)
        pub.flush(timeout=PATIENCE)
    assert equal(read_weights(bucket), served(weights))


def test_an_untyped_error_that_no_retry_mends_is_raised_by_name_and_the_uploader_goes_on():
    bucket, weights = Faulty(fresh()), model()
    with publishing(bucket) as pub:
        bucket.plan, _ = down(TypeError("put_new() takes no keyword"))
        pub.publish(weights)
        with pytest.raises(BucketError, match=r"TypeError: put_new\(\)"):
            pub.flush(timeout=PATIENCE)
        bucket.plan = never
        pub.flush(timeout=PATIENCE)
    assert equal(read_weights(bucket), served(weights))


def test_a_file_of_ours_that_cannot_be_read_is_named_with_the_variable_that_moves_it():
    bucket = Faulty(fresh())
    with publishing(bucket) as pub:
        gone = PermissionError(errno.EACCES, "Permission denied", "/spool/model.safetensors")
        bucket.plan, _ = down(gone)
        pub.publish(model())
        with pytest.raises(AccessRefused, match=r"/spool/model\.safetensors.*TMPDIR"):
            pub.flush(timeout=PATIENCE)
        bucket.plan = never
        pub.flush(timeout=PATIENCE)


def test_a_head_that_cannot_be_read_does_not_end_the_uploader():
    """On an empty bucket HEAD is written once; a damaged answer to who holds it is read again."""
    bucket, weights = Faulty(fresh()), model()
    with publishing(bucket) as pub:
        bucket.plan = on_key("HEAD", after=True, times=1)
        really, damaged = bucket.get, ["HEAD"]
        bucket.get = lambda key, *, limit: b"{}" if any(part in key for part in damaged) else really(key, limit=limit)
        pub.publish(weights)
        with pytest.raises(FormatError):
            pub.flush(timeout=PATIENCE)
        damaged.clear()
        pub.flush(timeout=PATIENCE)
    assert equal(read_weights(bucket), served(weights))


def test_payloads_come_before_their_commit_and_the_commit_before_the_head():
    bucket = Faulty(fresh())
    weights, later = model(), model(1)
    publish_all(bucket, weights, later)
    run = read_head(bucket).run
    steps = [key.removeprefix(f"runs/{run}/").split("/")[0] for key in bucket.done]
    assert steps == ["run.json", "anchors", "commits", "HEAD.json", "deltas", "commits", "HEAD.json"]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("n", range(7))
def test_a_trainer_killed_at_any_write_leaves_a_whole_chain_and_its_successor_continues(n, after):
    store = fresh()
    bucket = Faulty(store, from_write(n, after=after))
    weights = model()
    with pytest.raises(Unavailable):
        publish_all_within(bucket, 0.2, dict(weights), model(1))
    for commit in commits(store) if any(store.list("HEAD")) else []:
        for payload in commit.payloads:
            assert store.stat(f"runs/{commit.run}/{payload.key}").size == payload.size
    publish_all(store, model(2))
    assert equal(read_weights(store), served(model(2)))


def publish_all_within(bucket, seconds, *versions):
    pub = Publisher(bucket)
    try:
        for weights in versions:
            pub.publish(weights)
            pub.flush(timeout=seconds)
    finally:
        pub.close(timeout=0)


@pytest.mark.parametrize("part", ["run.json", "anchors/", "commits/000000", "HEAD", "deltas/", "commits/000001"])
def test_a_lost_acknowledgement_counts_as_success(part):
    bucket = Faulty(fresh(), on_key(part, after=True))
    weights, later = model(), model(1)
    publish_all(bucket, weights, later)
    assert [commit.version for commit in commits(bucket)] == [0, 1]
    assert equal(read_weights(bucket, 0), served(weights))
    assert equal(read_weights(bucket), served(later))


def test_versions_that_wait_for_the_store_fold_into_one_and_their_numbers_skip():
    bucket, weights, uploads = Faulty(fresh()), model(), []
    with publishing(bucket, on_upload=uploads.append) as pub:
        pub.publish(weights)
        pub.flush(timeout=PATIENCE)
        bucket.plan, asked = down()
        for step in range(1, 6):
            edit(weights, step)
            report = pub.publish(weights, step=step)
            assert asked.wait(PATIENCE)  # from here on version 1 is frozen
        assert (report.version, report.waiting) == (5, 5)
        assert "the store is down" in report.problem
        assert report.waiting_bytes > 0
        bucket.plan = never
        pub.flush(timeout=PATIENCE)
    assert [(commit.parent, commit.version, commit.step) for commit in commits(bucket)] == [
        (None, 0, None),
        (0, 1, 1),
        (1, 5, 5),
    ]
    assert [upload.versions for upload in uploads] == [1, 1, 4]
    assert uploads[1].attempts > 1
    assert equal(read_weights(bucket), served(weights))


def test_what_waits_for_the_store_is_never_more_than_one_step_per_weight_and_what_is_frozen():
    """By its own account and by the interpreter's; changes of every density, whose union is the whole model."""
    bucket, draw = Faulty(fresh()), np.random.default_rng(0)
    weights = {"w": draw.normal(0, 0.02, (1000, 400)).astype(np.float32)}
    model_bytes = 2 * weights["w"].size
    with publishing(bucket) as pub:
        pub.publish(weights)
        pub.flush(timeout=PATIENCE)
        bucket.plan, asked = down()
        edit(weights, 1, share=0.01)
        frozen = pub.publish(weights).waiting_bytes
        assert asked.wait(PATIENCE)  # from here on version 1 is frozen
        pub.publish(weights)
        gc.freeze()  # else each collection looks through all that other tests have loaded
        tracemalloc.start()
        try:
            for step in range(2, 40):
                edit(weights, step, share=0.001 * 1.2**step)
                report = pub.publish(weights)
                assert 0 < report.waiting_bytes <= report.waiting_bound <= model_bytes + frozen
                gc.collect()
                assert tracemalloc.get_traced_memory()[0] < model_bytes + frozen + (64 << 10)
        finally:
            tracemalloc.stop()
            gc.unfreeze()
        assert report.waiting_bytes > model_bytes  # the bound was reached, not only kept
        bucket.plan = never
        pub.flush(timeout=PATIENCE)
    assert equal(read_weights(bucket), served(weights))


def test_a_frozen_attempt_sends_the_same_bytes_however_much_is_published_meanwhile():
    bucket, weights = Faulty(fresh()), model()
    with publishing(bucket) as pub:
        pub.publish(weights)
        pub.flush(timeout=PATIENCE)
        frozen = served(weights)
        edit(weights, 1)
        first = served(weights)
        failed, again = threading.Event(), threading.Event()

        def plan(n, key):
            if "commits/000001" not in key or again.is_set():
                return None
            failed.set()
            return Fault(Unavailable("later"))

        bucket.plan = plan
        pub.publish(weights)
        assert failed.wait(PATIENCE)
        edit(weights, 2)
        pub.publish(weights)
        again.set()
        pub.flush(timeout=PATIENCE)
    assert len(bucket.sent("commits/000001")) > 1
    assert len(set(bucket.sent("commits/000001"))) == 1
    for version, expected in enumerate([frozen, first, served(weights)]):
        assert equal(read_weights(bucket, version), expected)


def test_changes_that_undo_each_other_while_waiting_become_an_empty_delta():
    bucket, weights = Faulty(fresh()), model()
    with publishing(bucket) as pub:
        pub.publish(weights)
        pub.flush(timeout=PATIENCE)
        bucket.plan, asked = down()
        pub.publish(weights)  # nothing changed: this is what freezes
        assert asked.wait(PATIENCE)
        pub.publish(model(1))
        pub.publish(weights)
        bucket.plan = never
        pub.flush(timeout=PATIENCE)
    assert [(commit.version, commit.payloads, commit.digests) for commit in commits(bucket)[1:]] == [
        (1, (), {}),
        (3, (), {}),
    ]
    assert equal(read_weights(bucket), served(weights))


def test_a_second_trainer_on_the_same_run_is_told_that_it_forked():
    bucket, weights = fresh(), model()
    publish_all(bucket, weights)
    first, second = Publisher(bucket), Publisher(bucket)
    try:
        first.publish(model(1))
        first.flush(timeout=PATIENCE)
        second.publish(model(2))
        with pytest.raises(Forked, match="two trainers publish one run"):
            second.flush(timeout=PATIENCE)
        with pytest.raises(Forked):
            second.publish(model(3))
    finally:
        first.close(timeout=PATIENCE)
        with pytest.raises(Forked):
            second.close(timeout=PATIENCE)
    assert equal(read_weights(bucket), served(model(1)))


def test_a_new_publisher_continues_after_a_folded_version():
    bucket, weights = Faulty(fresh()), model()
    with publishing(bucket) as pub:
        pub.publish(weights)
        pub.flush(timeout=PATIENCE)
        bucket.plan, asked = down()
        for step in range(4):
            edit(weights, step)
            pub.publish(weights)
            assert asked.wait(PATIENCE)
        bucket.plan = never
    edit(weights, 9)
    publish_all(bucket, weights)
    assert [(commit.parent, commit.version) for commit in commits(bucket)][2:] == [(1, 4), (4, 5)]
    assert equal(read_weights(bucket), served(weights))


def test_a_commit_made_durable_by_a_trainer_that_died_before_the_head_is_continued():
    store = fresh()
    publish_all(store, model())
    with pytest.raises(Unavailable):
        publish_all_within(Faulty(store, on_key("HEAD", times=10**9)), 0.2, model(1))
    assert read_head(store).version == 0
    publish_all(store, model(2))
    assert [commit.version for commit in commits(store)] == [0, 1, 2]
    assert equal(read_weights(store, 1), served(model(1)))


@pytest.mark.filterwarnings("ignore:the first publish does not look like a continuation")
@given(st.data())
def test_no_sequence_of_failures_ever_loses_a_change(tmp_path_factory, data):
    """Edits, publishes that break off at any tensor, uploads that fail before or after their effect, restarts."""
    store = fresh()
    bucket, weights = Faulty(store), model(data.draw(seeds))
    outcomes = st.sampled_from([None, None, Fault(Unavailable("before")), Fault(Unavailable("after"), after=True)])
    pub = Publisher(bucket)
    try:
        pub.publish(weights)
        for step in range(data.draw(st.integers(1, 8))):
            planned = data.draw(st.lists(outcomes, max_size=6))
            bucket.plan = lambda n, key, planned=planned: planned.pop() if planned else None
            edit(weights, data.draw(seeds), share=data.draw(st.sampled_from([0.0, 0.01, 0.3, 1.0])))
            what = data.draw(st.sampled_from(["publish", "publish", "break off", "flush", "restart"]))
            if what == "break off":
                with pytest.raises(MissingTensor):
                    pub.publish(list(weights.items())[: data.draw(st.integers(0, len(weights) - 1))], step=step)
            elif what == "publish":
                pub.publish(weights, step=step)
            elif what == "flush":
                pub.flush(timeout=PATIENCE)
            else:
                pub.close(timeout=PATIENCE)
                pub = Publisher(bucket)
        pub.publish(weights)
        pub.flush(timeout=PATIENCE)
    finally:
        pub.close(timeout=PATIENCE)
    out = tmp_path_factory.mktemp("materialized") / "policy"
    materialize(store, out)
    assert equal(dict(Checkpoint(out)), served(weights))


def test_a_commit_is_never_listed_before_it_is_whole():
    bucket = fresh()
    seen = []
    watched = Faulty(bucket, lambda n, key: seen.append((key, [*_listed(bucket)])))
    publish_all(watched, model(), model(1))
    run = read_head(bucket).run
    for key, versions in seen:
        if "deltas/" in key:
            assert versions == [0]
        if key == commit_key(run, 1):
            assert versions == [0]


def _listed(bucket):
    runs = {stat.key.split("/")[1] for stat in bucket.list("runs/")}
    return [version for run in runs for version in list_versions(bucket, run)]


def test_a_restarted_trainer_does_not_continue_a_commit_that_was_damaged_on_its_way():
    """Its writer's name is changed on the way: all of it still makes sense, and only its hash is another."""
    bucket, weights = fresh(), model()
    publish_all(bucket, weights)

    class Misread:
        """One reading of the commit has another writer's name in it."""

        def __init__(self):
            self.left = 1

        def __getattr__(self, name):
            return getattr(bucket, name)

        def get(self, key, *, limit):
            data = bucket.get(key, limit=limit)
            if key.endswith("commits/000000.json") and self.left:
                self.left -= 1
                return data.replace(b'"writer":"', b'"writer":"X')
            return data

    with pytest.raises(BadDigest, match="read in two ways; try again"):
        Publisher(Misread())
    edit(weights, 1)
    publish_all(bucket, weights)
    assert equal(read_weights(bucket), served(weights))


@pytest.mark.parametrize("damage", [1, 2])
def test_a_trainer_that_reads_a_commit_beyond_head_damaged_continues_from_it_all_the_same(damage):
    """It was killed before it moved HEAD on. What it passed over would be committed beside."""
    bucket, weights = fresh(), model()
    publish_all(bucket, weights)
    head = bucket.get(HEAD_KEY, limit=1000)
    edit(weights, 1)
    publish_all(bucket, weights)
    bucket.put(HEAD_KEY, head)
    with publishing(schedules.Faulty(bucket, schedules.at("get", "commits/000001", "truncate", times=damage))) as again:
        assert again.position.version == 1
        edit(weights, 2)
        again.publish(weights)
        edit(weights, 3)
        again.publish(weights)
        again.flush(PATIENCE)
    assert [commit.version for commit in commits(bucket)][:2] == [0, 1]
    assert equal(read_weights(bucket), served(weights))
