"""Ways through a run of codec `class`: forward with the weights before a delta, back by what is held or by folds."""

import msgspec
import numpy as np
import pytest
import torch
from blake3 import blake3
from class_runs import class_run, require_exact
from runs import PATIENCE, edit, fresh, model, position, publishing, read_weights, served
from torch import nn
from verbs import say

import deltawire as dw
from deltawire import Subscriber
from deltawire.cli.comparison import between_versions
from deltawire.errors import FormatError, Gap, NeedsBase, WrongBase
from deltawire.format import delta_file
from deltawire.format.checkpoint import Checkpoint
from deltawire.read.adding import Moved
from deltawire.read.held import HeldChanges
from deltawire.read.local_copy import LocalCopy
from deltawire.runlog.keys import delta_key, listed, needs_weights, payload_key
from deltawire.runlog.planner import Edge, cheapest
from deltawire.runlog.records import Payload
from deltawire.torch import follow
from deltawire.upkeep.compactor import Compactor
from deltawire.upkeep.materialize import materialize
from deltawire.upkeep.relay import Relay
from deltawire.upkeep.verify import verify
from deltawire.weights.bits import Bits
from deltawire.weights.delta import Delta, TensorDelta
from deltawire.weights.tensors import equal

LAST = 72


class Served(nn.Module):
    """A module with the tensors of `runs.model`."""

    def __init__(self):
        super().__init__()
        self.embed, self.layer = nn.Embedding(60, 8), nn.ModuleList([nn.Linear(8, 16)])
        self.norm, self.scale = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(()))
        self.bfloat16()

    @property
    def bits(self):
        return served(dict(self.named_parameters()))


@pytest.fixture(scope="module", params=["deltas alone", "folds and anchors"])
def run(request, tmp_path_factory):
    """The address of a run of 72 deltas, and the bits of each version."""
    folder, (bucket, versions) = tmp_path_factory.mktemp("run"), class_run(LAST + 1)
    if request.param != "deltas alone":
        with Compactor(bucket, folder / "mirror", levels=(4, 16), anchors=32) as compactor:
            compactor.step()
        assert {stat.key.split("/")[2] for stat in bucket.list("runs/")} >= {"folds", "derived"}
    return bucket.url, versions


@pytest.fixture
def short():
    """A bucket of versions 0 to 6 without folds, and their bits."""
    return class_run(7)


def fold(bucket, folder, levels=(4,)):
    with Compactor(bucket, folder, levels=levels, anchors="never") as compactor:
        return compactor.step()


@pytest.mark.parametrize("back", [1, 5, 70])
def test_a_follower_that_was_restarted_is_pinned_back_and_comes_forward_again(run, back):
    url, versions = run
    model = Served()
    with follow(model, url) as follower:
        assert follower.step().version == LAST
        assert equal(model.bits, versions[LAST])
    with follow(model, url) as follower:
        assert follower.position.version == LAST
        assert follower.step(LAST - back).version == LAST - back
        assert equal(model.bits, versions[LAST - back])
    with follow(model, url) as follower:
        assert follower.step().version == LAST
        assert equal(model.bits, versions[LAST])


@pytest.mark.parametrize("back", [1, 5, 70])
def test_a_copy_that_was_closed_is_taken_back_and_forward_again(run, back, tmp_path):
    url, versions = run
    for version in (LAST, LAST - back, LAST):
        copy = LocalCopy(tmp_path / "copy")
        with Subscriber(dw.open_bucket(url)) as subscriber:
            mirror, _ = copy.at(subscriber, version)
            assert equal(dict(mirror.weights), versions[version])
        copy.close()


def test_what_a_follower_applied_leads_back_without_a_byte_from_the_store():
    bucket, versions = class_run(7)
    model = Served()
    with follow(model, bucket.url) as follower:
        for version in range(7):
            follower.step(version)
        for version in (5, 3, 6, 4):
            follower.step(version)
            assert equal(model.bits, versions[version])
            applied = follower._worker.status().applied
            assert (applied.from_version is None, applied.wire_bytes) == (False, 0)


def test_every_verb_reads_such_a_run(run, tmp_path):
    url, versions = run
    bucket = dw.open_bucket(url)
    assert verify(bucket).deltas == LAST
    assert equal(read_weights(bucket), versions[LAST])
    require_exact(bucket, versions)
    for version in (LAST, 40):
        out = tmp_path / str(version)
        materialize(bucket, out, version)
        assert equal(dict(Checkpoint(out)), versions[version])
    materialize(bucket, tmp_path / "40", 60)
    assert equal(dict(Checkpoint(tmp_path / "40")), versions[60])
    Relay(bucket, other := fresh()).step()
    assert equal(read_weights(other), versions[LAST])


@pytest.mark.parametrize(("first", "second"), [(3, 9), (9, 3), (70, 72)])
def test_diff_compares_two_versions_either_way(run, first, second):
    url, versions = run
    delta, _ = between_versions(url, str(first), str(second), [])
    assert equal(versions[first] + delta, versions[second])
    assert say("diff", str(first), str(second), "--bucket", url)


def test_a_reader_without_weights_is_told_what_it_lacks_and_begins_at_an_anchor(short):
    bucket, versions = short
    with Subscriber(bucket) as subscriber:
        here = position(bucket, 2)
        with pytest.raises(NeedsBase, match=r'of codec "class".*pass those at 2 as weights='):
            subscriber.change(here, 5, anchors=False)
        with pytest.raises(NeedsBase, match=r'codec "class", which is read against the weights before it'):
            list(subscriber.updates(here))
        with pytest.raises(Gap):
            subscriber.change(here, 1, anchors=False)
        change = subscriber.change(here, 5)
        assert change.since is None
        assert equal(dict(Moved(change.anchor, change.delta)), versions[5])


def test_a_reader_without_weights_takes_folds_forward_and_back(short, tmp_path):
    bucket, versions = short
    assert [(report.parent, report.version) for report in fold(bucket, tmp_path / "mirror")] == [(0, 4)]
    with Subscriber(bucket) as subscriber:
        for start, end in ((0, 4), (4, 0)):
            change = subscriber.change(position(bucket, start), end, anchors=False)
            assert change.payloads == 1
            assert equal(versions[start] + change.delta, versions[end])


def test_a_delta_of_class_that_was_never_committed_closes_no_way():
    """A publisher that was killed between a payload and its commit leaves it."""
    bucket, weights, versions = fresh(), model(), {}
    with publishing(bucket) as publisher:
        for version in range(7):
            publisher.publish(weights)
            publisher.flush(PATIENCE)
            versions[version] = served(weights)
            edit(weights, version)
    left = payload_key(position(bucket, 3).run, delta_key(3, "ab" * 32, by_class=True))
    bucket.put(left, b"of an upload that was broken off")
    with Subscriber(bucket) as subscriber:
        for start, end in ((1, 6), (6, 1)):
            change = subscriber.change(position(bucket, start), end, anchors=False)
            assert equal(versions[start] + change.delta, versions[end])


def test_the_hint_for_joiners_says_which_deltas_need_weights(short, tmp_path):
    bucket, _ = short
    fold(bucket, tmp_path / "mirror")
    with Subscriber(bucket) as subscriber:
        found = [(edge.start, edge.end, edge.needs_weights) for edge in subscriber.chain.hint()]
    assert found == [(None, 0, False), (0, 4, False), (4, 5, True), (5, 6, True)]


def test_a_reader_with_weights_comes_forward_over_several_deltas_and_a_fold_at_once(short, tmp_path):
    bucket, versions = short
    with Subscriber(bucket) as subscriber:
        change = subscriber.change(position(bucket, 1), 6, weights=versions[1], anchors=False)
        assert change.payloads == 5
        assert equal(versions[1] + change.delta, versions[6])
    fold(bucket, tmp_path / "mirror")
    with Subscriber(bucket) as subscriber:
        change = subscriber.change(position(bucket, 0), 6, weights=versions[0], anchors=False)
        assert change.payloads == 3
        assert equal(versions[0] + change.delta, versions[6])


@pytest.mark.parametrize("at_once", [1, 400])
def test_a_long_way_is_read_in_stretches(short, monkeypatch, at_once):
    bucket, versions = short
    monkeypatch.setattr("deltawire.read.hops.AT_ONCE", at_once)
    with Subscriber(bucket) as subscriber:
        change = subscriber.change(position(bucket, 0), 6, weights=versions[0], anchors=False)
        assert equal(versions[0] + change.delta, versions[6])
        subscriber.keep(change)
        back = subscriber.change(position(bucket, 6), 5, anchors=False)
        assert (equal(versions[6] + back.delta, versions[5]), back.wire_bytes) == (True, 0)


def test_updates_are_read_with_the_weights_of_a_reader_that_moves_them(short):
    bucket, versions = short
    held = {name: bits.copy() for name, bits in versions[2].items()}
    with Subscriber(bucket) as subscriber:
        for update in subscriber.updates(position(bucket, 2), weights=held):
            update.delta.apply_(held)
            assert equal(held, versions[update.position.version])
    assert equal(held, versions[6])


class PartOfThem(dict):
    """A worker's weights, of which another holds some."""

    def __getitem__(self, name):
        if name == "layer.0.weight":
            raise NeedsBase("a part of it is elsewhere")
        return super().__getitem__(name)


def test_a_reader_that_holds_a_part_of_the_weights_takes_another_way(short):
    bucket, versions = short
    with Subscriber(bucket) as subscriber:
        change = subscriber.change(position(bucket, 2), 6, weights=PartOfThem(versions[2]))
        assert equal(dict(Moved(change.anchor, change.delta)), versions[6])
        with pytest.raises(NeedsBase, match="a part of it is elsewhere"):
            subscriber.change(position(bucket, 2), 6, weights=PartOfThem(versions[2]), anchors=False)


def test_weights_of_another_version_are_refused_or_lead_to_another_root(short):
    bucket, versions = short
    refused = 0
    with Subscriber(bucket) as subscriber:
        for other in range(3, 7):
            wrong = {
                name: Bits(bits.dtype, bits.shape, bits.data[::-1].copy()) for name, bits in versions[other].items()
            }
            try:
                change = subscriber.change(position(bucket, 2), 3, weights=wrong, anchors=False)
            except WrongBase:
                refused += 1
            else:
                assert not equal(versions[2] + change.delta, versions[3])
    assert refused


def test_a_copy_that_rotted_is_made_again(short, tmp_path):
    bucket, versions = short
    copy = LocalCopy(tmp_path / "copy")
    with Subscriber(bucket) as subscriber:
        mirror, _ = copy.at(subscriber, 2)
        mirror.weights["embed.weight"].data[:100] ^= 0x3F00
        mirror, _ = copy.at(subscriber, 6)
        assert equal(dict(mirror.weights), versions[6])
    copy.close()


@pytest.mark.parametrize("named", ["class", "subset"])
def test_a_file_of_another_codec_than_its_key_says_is_refused(short, named):
    bucket, versions = short
    with Subscriber(bucket) as subscriber:
        record = subscriber.chain.commit(3).record
        delta = Delta.between(versions[2], versions[3])
        codec = "subset" if named == "class" else "class"
        data = delta_file.encode(delta, codec=codec, base=versions[2], run=record.run, parent=2, version=3)
        seal = blake3(data).hexdigest()
        key = delta_key(3, seal, by_class=named == "class")
        bucket.put(payload_key(record.run, key), data)
        forged = msgspec.structs.replace(record, payloads=(Payload(key, len(data), seal),))
        with pytest.raises(FormatError, match=f"is of codec '{codec}', and its key says otherwise"):
            subscriber.fetch_delta(forged, versions[2])


def test_a_key_says_whether_its_delta_needs_weights():
    run, sealed = "0" * 16, "ab" * 32
    for by_class in (True, False):
        key = delta_key(7, sealed, by_class=by_class)
        found = listed(run, payload_key(run, key))
        assert (found.kind, found.end, found.needs_weights, needs_weights(key)) == ("delta", 7, by_class, by_class)
    assert not needs_weights("anchors/step_000000-abababababab/model.class.safetensors")


def test_no_way_leads_back_over_a_delta_that_needs_weights_nor_over_it_without_any():
    anchor, first = Edge(None, 0, 10_000, "anchor"), Edge(0, 1, 10, "d1")
    second, third = Edge(1, 2, 10, "d2", needs_weights=True), Edge(2, 3, 10, "d3")
    edges = [anchor, first, second, third]
    assert cheapest(edges, 0, 3) == [first, second, third]
    assert [edge.record for edge in cheapest(edges, 3, 2)] == ["d3"]
    assert cheapest(edges, 3, 1) == [anchor, first]
    assert cheapest(edges, 1, 3, weights=False) == [anchor, first, second, third]
    assert [edge.record for edge in cheapest(edges, 3, 2, weights=False)] == ["d3"]
    fold = Edge(0, 3, 50, "fold")
    assert [edge.record for edge in cheapest([*edges, fold], 1, 3, weights=False)] == ["d1", "fold"]
    with pytest.raises(Gap, match="without the weights at 1"):
        cheapest([first, second], 1, 2, weights=False)


def test_held_changes_are_bounded_the_oldest_go_first_and_another_record_is_none(monkeypatch):
    monkeypatch.setattr("deltawire.read.held.HELD", 1000)

    def change(size):
        return Delta({"w": TensorDelta("U8", (size,), None, np.ones(size, np.uint8))})

    held, half = HeldChanges(), change(500)
    held.keep({"c": ("hash c", change(10)), "b": ("hash b", half), "a": ("hash a", half)})
    assert held.keys() == {"b", "c"}
    held.keep({"d": ("hash d", half)})
    assert held.keys() == {"c", "d"}
    assert held.find("c", "hash c") == change(10)
    assert held.find("c", "another") is None
    assert held.keys() == {"d"}
