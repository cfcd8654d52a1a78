"""The trainer's promise: it never waits for the network, and no failure of it loses a change."""

import tempfile
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltawire import Publisher, Subscriber, materialize, open_bucket, publisher
from deltawire.checkpoint import Checkpoint
from deltawire.errors import (
    AccessRefused,
    DeltaWireError,
    Forked,
    MissingTensor,
    NotFound,
    OutOfSpace,
    Unavailable,
    UnknownVersion,
)
from deltawire.log import list_versions, read_head
from deltawire.manifests import commit_key
from deltawire.tensors import equal
from faults import Fault, Faulty, from_write, never, on_key
from runs import PATIENCE, commits, edit, fresh, model, publish_all, publishing, read_weights, served
from strategies import seeds


@pytest.fixture(autouse=True, scope="module")
def quick_retries():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publisher, "FIRST_RETRY", 0.001)
        patch.setattr(publisher, "LAST_RETRY", 0.01)
        yield


def down(error: Exception | None = None):
    """A store that fails every write; an event says when it was first asked."""
    asked = threading.Event()

    def plan(n: int, key: str) -> Fault:
        asked.set()
        return Fault(error or Unavailable("the store is down"))

    return plan, asked


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


def test_publish_returns_while_the_store_does_not_answer():
    bucket, weights = Faulty(fresh()), model()
    gate, inside = threading.Event(), threading.Event()

    def stall(n, key):
        inside.set()
        assert gate.wait(PATIENCE)

    with publishing(bucket) as pub:
        pub.publish(weights)
        pub.flush(timeout=PATIENCE)
        bucket.plan = stall
        edit(weights, 1)
        pub.publish(weights)
        assert inside.wait(PATIENCE)
        edit(weights, 2)
        report = pub.publish(weights)
        assert not gate.is_set()
        assert (report.version, report.waiting, report.problem) == (2, 2, None)
        assert pub.position.version == 0
        gate.set()
        assert pub.flush(timeout=PATIENCE).version == 2
    assert equal(read_weights(bucket), served(weights))


@pytest.mark.parametrize("kind", [AccessRefused, NotFound, OutOfSpace])
def test_flush_raises_at_once_what_waiting_cannot_cure_and_the_next_flush_tries_again(kind):
    bucket, weights = Faulty(fresh(), down(kind("planned"))[0]), model()
    with publishing(bucket) as pub:
        pub.publish(weights)
        for _ in range(2):
            with pytest.raises(kind, match="planned"):
                pub.flush(timeout=PATIENCE)
        bucket.plan = never
        assert pub.flush(timeout=PATIENCE).version == 0
    assert equal(read_weights(bucket), served(weights))


def test_flush_raises_at_once_even_when_the_next_try_is_half_a_minute_away(monkeypatch):
    monkeypatch.setattr(publisher, "FIRST_RETRY", 3600.0)
    plan, asked = down(AccessRefused("bad token"))
    bucket = Faulty(fresh(), plan)
    with publishing(bucket) as pub:
        pub.publish(model())
        assert asked.wait(PATIENCE)
        with pytest.raises(AccessRefused):
            pub.flush(timeout=PATIENCE)
        bucket.plan = never
        assert pub.flush(timeout=PATIENCE).version == 0


def test_flush_waits_for_a_store_that_may_come_back_and_says_so_when_time_is_up():
    bucket = Faulty(fresh(), down()[0])
    with publishing(bucket) as pub:
        pub.publish(model())
        with pytest.raises(Unavailable, match="the store is down"):
            pub.flush(timeout=0.05)
        bucket.plan = never


def test_a_bucket_that_is_not_there_is_named(tmp_path):
    url = f"file://{tmp_path}/no/such"
    with pytest.raises(NotFound, match="mkdir -p"), Publisher(open_bucket(url)) as pub:
        pub.publish(model())


def test_a_new_publisher_continues_the_run_with_the_difference_and_no_new_anchor():
    bucket, weights = fresh(), model()
    publish_all(bucket, weights)
    edit(weights, 1)
    with publishing(bucket) as pub:
        report = pub.publish(weights)
        assert 0 < report.changed < report.total / 2
    chain = commits(bucket)
    assert [(commit.parent, commit.version) for commit in chain] == [(None, 0), (0, 1)]
    assert len({commit.run for commit in chain}) == 1
    assert [stat.key for stat in bucket.list("runs/") if "anchors/" in stat.key and "step_000001" in stat.key] == []
    assert equal(read_weights(bucket), served(weights))


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


def test_a_run_whose_record_is_gone_is_not_silently_replaced_by_a_new_one():
    bucket = fresh()
    publish_all(bucket, model())
    bucket.delete(f"runs/{read_head(bucket).run}/run.json")
    with pytest.raises(NotFound, match=r"run\.json"):
        Publisher(bucket)


def test_a_commit_made_durable_by_a_trainer_that_died_before_the_head_is_continued():
    store = fresh()
    publish_all(store, model())
    with pytest.raises(Unavailable):
        publish_all_within(Faulty(store, on_key("HEAD", times=10**9)), 0.2, model(1))
    assert read_head(store).version == 0
    publish_all(store, model(2))
    assert [commit.version for commit in commits(store)] == [0, 1, 2]
    assert equal(read_weights(store, 1), served(model(1)))


@settings(max_examples=25)
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


def test_metrics_and_step_may_be_any_number_and_a_loss_of_nan_does_not_spoil_the_run():
    bucket = fresh()
    metrics = {"loss": float("nan"), "reward": np.float32(0.5), "kl": torch.tensor(2.0), "n": 3, "inf": np.inf}
    with publishing(bucket) as pub:
        pub.publish(model(), step=np.int64(7), metrics=metrics)
    (commit,) = commits(bucket)
    assert commit.step == 7
    assert commit.metrics == {"loss": None, "reward": 0.5, "kl": 2.0, "n": 3.0, "inf": None}


def test_metrics_that_are_no_numbers_are_refused_before_anything_is_captured():
    bucket, weights = fresh(), model()
    with publishing(bucket) as pub:
        with pytest.raises(ValueError, match="could not convert"):
            pub.publish(weights, metrics={"reward": "good"})
        assert pub.publish(weights).version == 0


def test_a_callback_that_raises_stops_the_publisher_loudly():
    def complain(report):
        raise RuntimeError("no room in the log")

    pub = Publisher(fresh(), on_upload=complain)
    pub.publish(model())
    pub._thread.join(PATIENCE)
    for again in (pub.flush, lambda: pub.publish(model(1)), pub.close):
        with pytest.raises(DeltaWireError, match=r"uploader stopped.*no room in the log"):
            again()


def test_a_closed_publisher_refuses_and_never_hangs():
    bucket = Faulty(fresh(), down()[0])
    pub = Publisher(bucket)
    pub.publish(model())
    with pytest.raises(Unavailable):
        pub.close(timeout=0.05)
    with pytest.raises(Unavailable):
        pub.flush()
    with pytest.raises(DeltaWireError):
        pub.publish(model(1))
    pub.close()


def test_closing_twice_is_closing_once():
    pub = Publisher(fresh())
    pub.publish(model())
    pub.close(timeout=PATIENCE)
    pub.close()
    assert pub.flush(timeout=PATIENCE).version == 0
    with pytest.raises(DeltaWireError, match="closed"):
        pub.publish(model(1))


def test_an_error_in_the_training_loop_is_not_hidden_by_one_of_the_store():
    bucket = Faulty(fresh(), down(AccessRefused("bad token"))[0])
    with pytest.raises(KeyError) as caught, Publisher(bucket) as pub:
        pub.publish(model())
        raise KeyError("reward")
    assert caught.value.__notes__ == ["deltawire: bad token"]


def test_the_position_and_the_reports_tell_what_happened():
    bucket, weights, uploads = fresh(), model(), []
    with publishing(bucket, on_upload=uploads.append) as pub:
        assert pub.position is None
        first = pub.publish(weights, step=10)
        pub.flush(timeout=PATIENCE)
        edit(weights, 1, "norm", share=1.0)
        second = pub.publish(weights, step=11)
        position = pub.flush(timeout=PATIENCE)
    assert (first.version, first.step, first.density) == (0, 10, 1.0)
    assert first.wire_bytes > first.model_bytes == 2 * first.total
    assert (second.version, second.changed, second.run) == (1, 8, first.run)
    assert second.seconds >= second.compare_seconds > 0
    assert [upload.position.version for upload in uploads] == [0, 1]
    assert uploads[1].wire_bytes == second.wire_bytes
    with Subscriber(bucket) as subscriber:
        assert subscriber.latest() == position == pub.position


def test_torch_parameters_of_a_model_are_published_as_they_are():
    layer = torch.nn.Linear(8, 4)
    bucket = fresh()
    with publishing(bucket) as pub:
        pub.publish(layer.named_parameters())
        with torch.no_grad():
            layer.weight += 1
        pub.publish(layer.named_parameters())
    assert equal(read_weights(bucket), served(dict(layer.named_parameters())))


def test_host_memory_and_disk_of_an_anchor_are_given_back_once_it_is_in_the_bucket(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    bucket = fresh()
    for start in (0, 1):  # the first publishes an anchor, the second rebuilds the baseline from it
        with publishing(bucket) as pub:
            pub.publish(model(start))
            pub.flush(timeout=PATIENCE)
            assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert list(tmp_path.iterdir()) == []


def test_a_publisher_that_cannot_open_leaves_nothing_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(NotFound):
        Publisher(fresh(), base=tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


def test_a_codec_that_cannot_be_published_is_refused():
    with pytest.raises(UnknownVersion, match="raw"):
        Publisher(fresh(), codec="raw")


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
