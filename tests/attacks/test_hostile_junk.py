"""Junk under the keys of records stops nobody: it is read once, passed over, and counted by `verify`."""

import msgspec
import numpy as np
import pytest
from blake3 import blake3
from runs import chain_of_four, commits, edit, fresh, model, publish_all, publishing, read_weights, served
from verbs import run_verb

from attacks.hostile import JUNK, add, anchor_of, claim, continued, encode, litter
from deltawire import Subscriber, digest, materialize, open_bucket, verify
from deltawire.errors import BadDigest, Forked, TooLarge
from deltawire.format import delta_file
from deltawire.format.checkpoint import Checkpoint
from deltawire.runlog import heartbeats, signing
from deltawire.runlog.keys import HEAD_KEY, commit_key, derived_key
from deltawire.runlog.log import current_run
from deltawire.runlog.records import Derived, Payload, hash_of, read
from deltawire.upkeep import retention
from deltawire.upkeep.compactor import Compactor
from deltawire.weights.bits import Bits
from deltawire.weights.delta import Delta, TensorDelta
from deltawire.weights.tensors import equal


@pytest.fixture
def chain():
    """Versions 0 to 3, and the bits at 3."""
    bucket, steps = chain_of_four()
    return bucket, steps[3]


def pruned(tmp_path):
    """Versions 8 to 12 of which 8 is an anchor, and the bits at 12: what came before was pruned."""
    bucket, weights = fresh(), model()
    with publishing(bucket) as publisher:
        for step in range(13):
            edit(weights, step, share=0.02)
            publisher.publish(weights)
            publisher.flush(30)
            if step == 8:
                with Compactor(bucket, tmp_path / "mirror", anchors=8) as compactor:
                    compactor.step()
    run = commits(bucket)[0].run
    pruned = retention.find_prunable(bucket, run, retention.Policy(anchors=1, hours=0.0))
    retention.carry_out(bucket, pruned)
    assert commits(bucket)[0].version == 8
    return bucket, served(weights)


def survives(bucket, weights, tmp_path):
    """Every verb that reads a run does."""
    assert equal(read_weights(bucket), weights)
    assert equal(dict(Checkpoint(materialize(bucket, tmp_path / "out").folder)), weights)
    assert commits(bucket)
    return verify(bucket)


def test_junk_stops_no_verb_and_is_counted(chain, tmp_path):
    bucket, weights = chain
    first = commits(bucket)[0]
    count = litter(bucket, first.run, 3)
    assert survives(bucket, weights, tmp_path).junk == count
    assert heartbeats.read_all(bucket) == []


def test_junk_anchors_stop_no_reader_of_a_pruned_run(tmp_path):
    bucket, weights = pruned(tmp_path)
    kept = commits(bucket)
    litter(bucket, kept[0].run, 8)
    anchor_of(bucket, msgspec.structs.replace(kept[0], created=1.0), {})  # of another commit 8
    anchor_of(bucket, kept[0], {"norm": "0" * 16})  # of this one, with digests that are not its
    assert equal(read_weights(bucket), weights)
    assert equal(dict(Checkpoint(materialize(bucket, tmp_path / "out").folder)), weights)
    assert [commit.version for commit in commits(bucket)] == [8, 9, 10, 11, 12]


def test_log_and_verify_say_it_on_the_command_line(tmp_path):
    url = (tmp_path / "bucket").as_uri()
    bucket = open_bucket(url, create=True)
    publish_all(bucket, model(), model(1))
    litter(bucket, commits(bucket)[0].run, 1)
    assert len(run_verb("log", url, "--json").stdout.splitlines()) == 2
    assert f"{2 * len(JUNK)} objects under keys of folds or anchors are none" in run_verb("verify", url).stdout


def test_a_sound_record_whose_payload_is_wrong_is_still_an_error_for_verify(chain, tmp_path):
    bucket, weights = chain
    last = commits(bucket)[-1]
    key = f"runs/{last.run}/anchors/step_000003-{'0' * 12}/model.safetensors"
    bucket.put(key, b"wrong")
    digests = {name: f"{value:016x}" for name, value in digest(weights).items()}
    anchor_of(bucket, last, digests, [claim(key.removeprefix(f"runs/{last.run}/"), 5)])
    with pytest.raises(BadDigest, match=r"model\.safetensors"):
        verify(bucket)
    assert equal(read_weights(bucket), weights)


def test_two_anchors_of_one_version_do_not_share_what_was_fetched(chain, tmp_path):
    """A stranger's lists other bytes under the same file name."""
    bucket, weights = chain
    with Compactor(bucket, tmp_path / "mirror", anchors=1) as compactor:
        compactor.step()
    (sound,) = [stat.key for stat in bucket.list("runs/") if "/derived/anchor-000003" in stat.key]
    record = read(Derived, bucket.get(sound, limit=1 << 20), where=sound)
    (path,) = [payload for payload in record.payloads if payload.key.endswith(".safetensors")]
    data = bytearray(bucket.get(f"runs/{record.run}/{path.key}", limit=1 << 20))
    data[-1] ^= 1
    forged = f"anchors/step_000003-{'f' * 12}/model.safetensors"
    bucket.put(f"runs/{record.run}/{forged}", bytes(data))
    payloads = (Payload(forged, len(data), blake3(data).hexdigest()),)
    key = derived_key(record.run, None, 3, payloads)
    bucket.put(key, encode(msgspec.structs.replace(record, payloads=payloads)))
    with Subscriber(bucket) as subscriber:
        edges = {edge.record: edge for edge in subscriber.chain.edges()}
        for record_key, is_sound in ((key, False), (sound, True)):
            (hop,) = subscriber.chain.read([edges[record_key]])
            if is_sound:
                assert equal({name: subscriber.open_anchor(hop.filed.record)[name] for name in weights}, weights)
            else:
                with pytest.raises(BadDigest):
                    subscriber.open_anchor(hop.filed.record)


@pytest.mark.parametrize("what", ["another tensor", "another shape", "a digest of another tensor"])
def test_a_fold_of_what_the_run_does_not_train_is_passed_over(tmp_path, what):
    bucket, weights = fresh(), model()
    steps = []
    for step in range(9):
        edit(weights, step, share=0.02)
        steps.append({name: tensor.copy() for name, tensor in weights.items()})
    publish_all(bucket, *steps)
    chain = commits(bucket)
    name, shape = ("intruder", (8,)) if what == "another tensor" else ("norm", (9,))
    delta = Delta({name: TensorDelta("BF16", shape, np.zeros(1, np.int64), np.ones(1, np.uint16))})
    data = delta_file.encode(delta, run=chain[0].run, parent=0, version=8)
    payload = Payload(f"folds/step_000000-000008-{'0' * 12}.safetensors", len(data), blake3(data).hexdigest())
    bucket.put(f"runs/{chain[0].run}/{payload.key}", data)
    listed = {"intruder" if what == "a digest of another tensor" else "norm": "0" * 16}
    record = Derived(chain[0].run, 8, 0, chain[8].root, listed, (payload,),
                     commit_hash=hash_of(encode(chain[8])), parent_hash=hash_of(encode(chain[0])))  # fmt: skip
    bucket.put(derived_key(record.run, 0, 8, record.payloads), encode(record))
    with Subscriber(bucket) as subscriber:
        change = subscriber.change(chain[0].position, 8, anchors=False)
    held = {name: Bits(bits.dtype, bits.shape, bits.data.copy()) for name, bits in served(steps[0]).items()}
    assert equal(held + change.delta, served(steps[8]))


def test_a_commit_of_another_tensor_beyond_head_is_passed_over(chain, tmp_path):
    bucket, weights = chain
    last = commits(bucket)[-1]
    head = bucket.get(HEAD_KEY, limit=1 << 20)
    add(bucket, continued(last, digests={"intruder": "0" * 16}))
    bucket.put(HEAD_KEY, head)
    survives(bucket, weights, tmp_path)


def test_a_junk_commit_between_versions_is_no_second_writer(chain, tmp_path):
    bucket, weights = chain
    last = commits(bucket)[-1]
    later = continued(last, version=6, parent=3)
    add(bucket, later)
    bucket.put(commit_key(last.run, 5), b"junk")
    survives(bucket, weights, tmp_path)
    bucket.put(commit_key(last.run, 5), encode(continued(last, version=5, parent=3)))
    with pytest.raises(Forked, match="is not on the chain"):
        commits(bucket)


def test_junk_runs_beside_a_damaged_head_are_passed_over(chain, tmp_path):
    bucket, weights = chain
    run = commits(bucket)[0].run
    bucket.put(HEAD_KEY, b"junk")
    bucket.put("runs/ffffffffffffffff/commits/000000.json", b"{}")
    bucket.put("runs/eeeeeeeeeeeeeeee/commits/000000.json", b"{}")
    bucket.put("runs/eeeeeeeeeeeeeeee/run.json", bucket.get(f"runs/{run}/run.json", limit=1 << 20))
    assert current_run(bucket) == run
    assert equal(read_weights(bucket), weights)


def test_an_unsigned_run_beside_a_damaged_head_is_passed_over_by_who_trusts_a_key(tmp_path):
    bucket, other, key = fresh(), fresh(), signing.generate_key(tmp_path / "key")
    publish_all(bucket, model(), signing_key=tmp_path / "key")
    run = commits(bucket)[0].run
    publish_all(other, model(1))
    for stat in other.list("runs/"):
        bucket.put(stat.key, other.get(stat.key, limit=1 << 20))
    bucket.put(HEAD_KEY, b"junk")
    with Subscriber(bucket, trusted=[key.public]) as subscriber:
        assert subscriber.latest().run == run


def test_heartbeats_that_speak_for_others_or_without_an_end_are_not_read(monkeypatch):
    bucket = fresh()
    heartbeats.beat(bucket, heartbeats.Heartbeat("a", version=3))
    bucket.put("replicas/b.json", encode(heartbeats.Heartbeat("a", version=0)))
    bucket.put("replicas/c.json", b"[" * 100_000)
    bucket.put("replicas/deeper/a.json", encode(heartbeats.Heartbeat("a", version=1)))
    assert [(stat.key, beat.version) for stat, beat in heartbeats.read_all(bucket)] == [("replicas/a.json", 3)]
    monkeypatch.setattr(heartbeats, "MAX_REPLICAS", 1)
    heartbeats.beat(bucket, heartbeats.Heartbeat("d"))
    with pytest.raises(TooLarge, match="more than 1 heartbeats"):
        heartbeats.read_all(bucket)
