"""Codec `class` in a run: written only against the bits of the version before, whatever else went wrong."""

import threading
import time

import numpy as np
import planted
import pytest
from class_runs import class_run, codecs, deltas, require_exact, say
from faults import Faulty, down, never, on_key
from runs import PATIENCE, commits, edit, fresh, model, publish_all, publishing, read_weights, served, table

from deltawire.buckets.forwarding import Forwarding
from deltawire.errors import BadDigest, DeltaWireError, MissingTensor, TooLarge, Unavailable
from deltawire.format import checkpoint, delta_file
from deltawire.format.codecs import directory, tiles
from deltawire.publish.beats import TrainerBeats
from deltawire.publish.receivers import Receivers
from deltawire.runlog import heartbeats, log
from deltawire.runlog.heartbeats import Heartbeat
from deltawire.upkeep.verify import verify
from deltawire.weights.bits import Bits, unsigned
from deltawire.weights.tensors import equal


@pytest.fixture
def trained():
    """Weights that are trained on, and a store that may fail."""
    return model(), Faulty(fresh())


def sent(publisher, weights):
    """Publish weights as a version of their own; what a server then holds."""
    publisher.publish(weights)
    publisher.flush(PATIENCE)
    return served(weights)


def test_every_delta_is_of_the_class_of_the_bits_before_it_and_a_listing_says_so():
    bucket, versions = class_run(6)
    assert codecs(bucket) == dict.fromkeys(range(1, 6), "class")
    assert log.read_run(bucket, commits(bucket)[0].run).codecs == ("subset", "class")
    require_exact(bucket, versions)
    assert equal(read_weights(bucket), versions[5])
    assert verify(bucket).deltas == 5


def test_a_delta_of_other_weights_than_its_parent_s_is_found_by_verify(monkeypatch):
    planted.class_is_ranked_by_the_bits_after_it(monkeypatch)
    bucket, _ = class_run(6)
    with pytest.raises(BadDigest, match="/commits/"):
        verify(bucket)


def test_tiles_that_are_too_many_for_a_file_make_it_subset(monkeypatch):
    monkeypatch.setattr(tiles, "choose_within", lambda shape, cut: (1, tiles.matrix(shape)[1]))
    monkeypatch.setattr(directory, "MAX_TILES", len(model()))
    bucket, versions = class_run(3)
    assert codecs(bucket) == {1: "subset", 2: "subset"}
    require_exact(bucket, versions)
    assert "too many for one file" in commits(bucket)[1].choice
    with publishing(bucket) as publisher:
        edit(weights := model(), 9)
        monkeypatch.setattr(directory, "MAX_TILES", 1)
        with pytest.raises(TooLarge, match="more than 1 tiles for one file"):
            publisher.publish(weights)
        monkeypatch.undo()
        publisher.publish(weights)
    assert equal(read_weights(bucket), served(weights))


def test_it_takes_fewer_bytes_than_subset():
    sizes = {}
    for codec in ("subset", "class"):
        bucket, weights = fresh(), {"w": model()["embed.weight"].repeat(100, axis=0)}
        with publishing(bucket, codec=codec) as publisher:
            for step in range(3):
                publisher.publish(weights)
                publisher.flush(PATIENCE)
                weights["w"] = weights["w"] * (1 + 2e-5 * step)
        sizes[codec] = sum(map(len, deltas(bucket).values()))
    assert sizes["class"] < 0.9 * sizes["subset"]


@pytest.mark.usefixtures("quick_retries")
def test_versions_that_waited_or_folded_are_of_subset_and_the_next_one_is_of_class_again(trained):
    weights, bucket = trained
    versions, reported = {}, []
    with publishing(bucket, codec="class") as publisher:

        def publish(seed):
            edit(weights, seed)
            report = publisher.publish(weights)
            versions[report.version] = served(weights)
            reported.append(report.codec)

        publish(0)
        publisher.flush(PATIENCE)
        bucket.plan, asked = down()
        publish(1)
        assert asked.wait(PATIENCE)
        publish(2)  # waits, without bytes
        publish(3)  # folds into it
        bucket.plan = never
        publisher.flush(PATIENCE)
        publish(4)
        publisher.flush(PATIENCE)
    assert codecs(bucket) == {1: "class", 3: "subset", 4: "class"}
    assert reported == ["subset", *["class"] * 4]  # the anchor's, and what each was before it waited
    require_exact(bucket, versions)
    assert equal(read_weights(bucket), versions[4])


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize("where", ["/deltas/", "/commits/", "HEAD"])
@pytest.mark.parametrize("after", [False, True])
def test_a_failed_upload_is_tried_again_with_the_same_bytes(trained, where, after):
    weights, bucket = trained
    versions = {}
    with publishing(bucket, codec="class") as publisher:
        for version in range(3):
            versions[version] = served(weights)
            publisher.publish(weights)
            bucket.plan = on_key(where, times=2, after=after) if version else never
            publisher.flush(PATIENCE)
            edit(weights, version)
    assert codecs(bucket) == {1: "class", 2: "class"}
    require_exact(bucket, versions)


def test_a_version_that_carries_the_change_of_a_failed_publish_is_read_against_the_version_before_both(trained):
    weights, bucket = trained
    with publishing(bucket, codec="class") as publisher:
        versions = {0: sent(publisher, weights)}
        edit(weights, 1)
        with pytest.raises(MissingTensor):
            publisher.publish({name: weights[name] for name in ("embed.weight", "norm")})
        edit(weights, 2)
        versions[1] = sent(publisher, weights)
    require_exact(bucket, versions)
    assert equal(read_weights(bucket), versions[1])


@pytest.mark.parametrize("error", [DeltaWireError("no room"), OSError("no room")])
def test_a_publish_that_fails_while_it_encodes_keeps_its_change_for_the_next(trained, monkeypatch, error):
    weights, bucket = trained
    encode = delta_file.encode

    def fail(*given, **options):
        monkeypatch.setattr(delta_file, "encode", encode)
        raise error

    with publishing(bucket, codec="class") as publisher:
        versions = {0: sent(publisher, weights)}
        edit(weights, 1)
        monkeypatch.setattr(delta_file, "encode", fail)
        with pytest.raises(type(error)):
            publisher.publish(weights)
        edit(weights, 2)
        versions[1] = sent(publisher, weights)
    assert codecs(bucket) == {1: "subset"}  # what was found in two pieces was ranked in none
    require_exact(bucket, versions)


def test_after_an_interrupt_while_it_encodes_a_new_publisher_goes_on_from_the_last_commit(trained, monkeypatch):
    weights, bucket = trained
    encode = delta_file.encode

    def interrupt(*given, **options):
        raise KeyboardInterrupt

    with publishing(bucket, codec="class") as publisher:
        versions = {0: sent(publisher, weights)}
        edit(weights, 1)
        monkeypatch.setattr(delta_file, "encode", interrupt)
        with pytest.raises(KeyboardInterrupt):
            publisher.publish(weights)
        monkeypatch.setattr(delta_file, "encode", encode)
        with pytest.raises(DeltaWireError, match="interrupted"):
            publisher.publish(weights)
    with publishing(bucket, codec="class") as publisher:
        versions[1] = sent(publisher, weights)
        edit(weights, 2)
        versions[2] = sent(publisher, weights)
    assert codecs(bucket) == {1: "class", 2: "class"}
    require_exact(bucket, versions)


def test_a_run_that_is_continued_keeps_what_it_lists():
    """A trainer writes class where it asks for it and the run lists it."""
    for begun, continued, written in (("class", "subset", "subset"), ("subset", "class", "subset")):
        bucket, weights = fresh(), model()
        publish_all(bucket, weights, codec=begun)
        edit(weights, 1)
        publish_all(bucket, weights, codec=continued)
        assert codecs(bucket) == {1: written}
        assert equal(read_weights(bucket), served(weights))


def test_a_run_that_starts_from_a_base_has_its_first_delta_in_class_too(tmp_path):
    weights = model()
    checkpoint.write(tmp_path, table(served(weights)), served(weights))
    bucket, versions = fresh(), {0: served(weights)}
    edit(weights, 1)
    versions[1] = served(weights)
    publish_all(bucket, weights, codec="class", base=tmp_path)
    assert codecs(bucket) == {1: "class"}
    require_exact(bucket, versions)
    assert equal(read_weights(bucket, base=tmp_path), versions[1])


@pytest.mark.parametrize("baseline", ["host", "file"])
def test_tensors_of_every_width_are_of_class_or_as_in_subset_wherever_the_baseline_lies(baseline):
    bucket, draw = fresh(), np.random.default_rng(0)
    weights = {
        dtype: Bits(dtype, (2000,), draw.integers(0, 1 << 8 * unsigned(dtype).itemsize, 2000, unsigned(dtype)))
        for dtype in ("U8", "F8_E4M3", "F16", "BF16", "I32", "F32", "F64")
    }
    versions = []
    with publishing(bucket, codec="class", baseline=baseline) as publisher:
        for _ in range(4):
            publisher.publish(weights)
            publisher.flush(PATIENCE)
            versions.append({name: bits.copy() for name, bits in weights.items()})
            for bits in weights.values():
                bits.data[draw.integers(0, 2000, 60)] += 1
    assert codecs(bucket) == dict.fromkeys(range(1, 4), "class")
    assert verify(bucket).deltas == 3
    for version, expected in enumerate(versions):
        assert equal(read_weights(bucket, version), expected)


def test_while_one_replica_does_not_read_class_versions_are_of_subset_and_the_log_says_whose_fault_it_is(caplog):
    bucket, weights = fresh(), model()
    publish_all(bucket, weights, codec="class")
    now, written = time.time(), []
    for names in (("subset", "class", "gap"), ("subset", "gap"), (), ("class",)):
        say(bucket, "a", *names, at=now)
        edit(weights, len(written))
        publish_all(bucket, weights, codec="class")
        written.append(codecs(bucket)[len(written) + 1])
    assert written == ["class", "subset", "subset", "class"]
    assert "versions are of codec subset until all replicas read class: 1 do not read class: a" in caplog.text


def test_a_silent_replica_is_no_veto():
    bucket, now = fresh(), time.time()
    say(bucket, "a", "subset", at=now, every=10.0)
    for seconds, expected in ((0, False), (29, False), (4000, True)):
        receivers = Receivers(bucket, asked=True, clock=lambda ahead=seconds: now + ahead)
        assert (receivers.heard.cuts is not None) == expected


def test_what_replicas_cut_is_put_together_and_a_silent_one_s_is_not():
    bucket, now = fresh(), time.time()
    for name, at, cuts in (
        ("a", now, {"w": (12, 0)}),
        ("b", now, {"w": (8, 64), "v": (0, 2)}),
        ("c", 0, {"w": (1, 1)}),
    ):
        heartbeats.beat(bucket, Heartbeat(name, at=at, every=30.0, codecs=("subset", "gap"), cuts=cuts))
    say(bucket, "whole", "class", at=now)
    [stat] = bucket.list("replicas/c")
    clock = stat.modified + 3600
    assert Receivers(bucket, asked=True, clock=lambda: now).heard.cuts == {"w": (1, 1), "v": (0, 2)}
    for name in "ab":
        heartbeats.beat(bucket, Heartbeat(name, at=clock, every=30.0, cuts={"w": (12 if name == "a" else 8, 0)}))
    assert Receivers(bucket, asked=True, clock=lambda: clock).heard.cuts == {"w": (4, 0)}


class Blind(Forwarding):
    """A store that shows nobody's heartbeats."""

    def list(self, prefix, *, after=""):
        raise Unavailable("the store is down")


def test_a_store_that_does_not_show_its_replicas_is_a_veto_and_is_not_asked_where_nobody_wants_to_know(caplog):
    for asked, said in ((True, 1), (False, 0)):
        caplog.clear()
        receivers = Receivers(Blind(fresh()), asked=asked)
        receivers.look()
        assert receivers.heard.cuts is None
        assert caplog.text.count("heartbeats cannot be read") == said


def test_replicas_are_looked_at_while_the_trainer_trains():
    looked = threading.Event()
    beats = TrainerBeats(fresh(), lambda: None, looked.set, every=0.001)
    try:
        assert looked.wait(PATIENCE)
    finally:
        beats.close()
