"""A run lists the codecs of its deltas when it begins, and keeps them: nobody who can read its start is left behind."""

import json

import msgspec
import pytest
from blake3 import blake3
from runs import edit, fresh, model, publish_all, publishing, read_weights, served

from deltawire import Subscriber
from deltawire.buckets.base import Bucket
from deltawire.errors import FormatError, UnknownVersion
from deltawire.format import container, delta_file
from deltawire.format.codecs import fused
from deltawire.runlog import records
from deltawire.upkeep.compactor import Compactor
from deltawire.weights.tensors import equal


def run_record(bucket: Bucket) -> dict:
    (key,) = (info.key for info in bucket.list("runs/") if info.key.endswith("run.json"))
    return json.loads(bucket.get(key, limit=1 << 20))


def codecs_written(bucket: Bucket, where: str = "/deltas/") -> set[str]:
    keys = [info.key for info in bucket.list("runs/") if where in info.key and info.key.endswith(".safetensors")]
    return {container.read_header(bucket.get(key, limit=1 << 20)).metadata["codec"] for key in keys}


def versions(count: int, seed: int = 0) -> list[dict]:
    weights, found = model(seed), []
    for step in range(count):
        found.append({name: tensor.copy() for name, tensor in weights.items()})
        edit(weights, step, share=0.05)
    return found


def test_a_new_run_is_of_codec_subset_and_says_so():
    bucket, steps = fresh(), versions(3)
    publish_all(bucket, *steps)
    assert (run_record(bucket)["codecs"], run_record(bucket)["format"]) == (["subset"], 3)
    assert codecs_written(bucket) == {"subset"}
    assert equal(read_weights(bucket), served(steps[-1]))


def test_a_run_of_codec_gap_lists_nothing_so_that_every_reader_knows_it():
    bucket, steps = fresh(), versions(3)
    publish_all(bucket, *steps, codec="gap")
    assert "codecs" not in run_record(bucket)
    assert run_record(bucket)["format"] == 1
    assert codecs_written(bucket) == {"gap"}


@pytest.mark.parametrize(("codec", "by_class"), [("subset", [False]), ("class", [True]), ("gap", [])])
def test_the_loops_of_a_runs_codec_are_compiled_before_its_first_change_and_when_it_is_continued(
    codec, by_class, monkeypatch
):
    warmed, bucket, steps = [], fresh(), versions(3)
    monkeypatch.setattr(fused, "warm_up", lambda dtypes, *, by_class: warmed.append((set(dtypes), by_class)))
    dtypes = {bits.dtype for bits in served(steps[0]).values()}
    with publishing(bucket, codec=codec) as publisher:
        publisher.publish(steps[0])
        assert [found for found in warmed if found[0]] == [(dtypes, own) for own in by_class]
        publisher.publish(steps[1])
    warmed.clear()
    with publishing(bucket, codec=codec):
        assert warmed == [(dtypes, own) for own in by_class]


@pytest.mark.parametrize(("begun", "continued"), [("gap", "subset"), ("subset", "gap")])
def test_a_run_that_is_continued_keeps_its_codec(begun, continued):
    bucket, steps = fresh(), versions(5)
    publish_all(bucket, *steps[:3], codec=begun)
    before = run_record(bucket)
    with publishing(bucket, codec=continued) as publisher:
        for step in steps[3:]:
            publisher.publish(step)
            publisher.flush(30)
    assert codecs_written(bucket) == {begun}
    assert run_record(bucket) == before
    assert equal(read_weights(bucket), served(steps[-1]))


@pytest.mark.parametrize("codec", ["gap", "subset"])
def test_folds_are_of_the_run_s_codec_and_lead_to_the_same_weights(codec, tmp_path):
    bucket, steps = fresh(), versions(6)
    publish_all(bucket, *steps, codec=codec)
    with Compactor(bucket, tmp_path / "mirror", anchors=100) as compactor:
        assert compactor.step()
    assert codecs_written(bucket, "/folds/") == {codec}
    with Subscriber(bucket) as subscriber:
        here = subscriber.chain.commit(0).record.position
        change = subscriber.change(here, 5)
        assert equal(served(steps[0]) + change.delta, served(steps[5]))


def test_a_payload_of_a_codec_that_the_run_does_not_list_is_refused():
    bucket, steps = fresh(), versions(2)
    publish_all(bucket, *steps)
    with Subscriber(bucket) as subscriber:
        record = subscriber.chain.commit(1).record
        delta = subscriber.fetch_delta(record)
        data = delta_file.encode(delta, codec="gap", run=record.run, parent=0, version=1)
        (payload,) = record.payloads
        key = f"runs/{record.run}/{payload.key}.other"
        bucket.put(key, data)
        other = records.Payload(f"{payload.key}.other", len(data), blake3(data).hexdigest())
        with pytest.raises(FormatError, match="codec 'gap', where its run allows subset"):
            subscriber.fetch_delta(msgspec.structs.replace(record, payloads=(other,)))


def test_a_run_that_supersedes_another_may_be_of_another_codec():
    bucket, steps = fresh(), versions(4)
    publish_all(bucket, *steps[:2], codec="gap")
    publish_all(bucket, *steps[2:], run="supersede")
    assert codecs_written(bucket) == {"gap", "subset"}
    assert equal(read_weights(bucket), served(steps[-1]))


def test_a_codec_that_no_run_may_list_cannot_be_published():
    with (
        pytest.raises(UnknownVersion, match='use "subset", "class", "auto" or "gap"'),
        publishing(fresh(), codec="raw"),
    ):
        pass
