"""Verifying a bucket: everything that a reader may ever be given is read, and what is wrong is named."""

import os
import re
import tempfile

import msgspec
import pytest
from blake3 import blake3
from runs import edit, fresh, model, publish_all, publishing, replace_commit, served, table

from deltawire import decode, encode, verify
from deltawire.errors import BadDigest, BadSignature, Forked, FormatError, Gap, NotFound
from deltawire.format import checkpoint
from deltawire.runlog import signing
from deltawire.runlog.keys import derived_key, fold_key
from deltawire.runlog.records import Derived, Payload, read, write
from deltawire.upkeep import retention
from deltawire.upkeep.compactor import Compactor
from deltawire.weights.delta import Delta


@pytest.fixture
def bucket(tmp_path):
    """Versions 0 to 8, two folds, and anchors at 0 and 8."""
    bucket, weights = fresh(), model()
    with publishing(bucket) as publisher:
        for step in range(9):
            edit(weights, step, share=0.02)
            publisher.publish(weights)
            publisher.flush(30)
    with Compactor(bucket, tmp_path / "mirror", anchors=8) as compactor:
        compactor.step()
    return bucket


def key_of(bucket, part):
    (key,) = [stat.key for stat in bucket.list("runs/") if part in stat.key]
    return key


def test_all_that_a_run_holds_is_read_once(bucket):
    seen = []
    report = verify(bucket, on_read=lambda edge, total: seen.append((edge.start, edge.end, total)))
    assert (report.first, report.position.version, report.anchors, report.deltas, report.folds) == (0, 8, 2, 8, 2)
    assert len(seen) == len(set(seen)) == 12 == seen[0][2]
    payloads = [stat for stat in bucket.list("runs/") if re.search("/(deltas|folds|anchors)/", stat.key)]
    assert report.fetched_bytes == sum(stat.size for stat in payloads)


@pytest.mark.parametrize(
    "part", ["deltas/step_000003", "folds/step_000000-000004", "anchors/step_000000", "anchors/step_000008"]
)
def test_a_damaged_byte_is_found_wherever_it_is(bucket, part):
    key = key_of(bucket, part)
    data = bytearray(bucket.get(key, limit=1 << 20))
    data[-1] ^= 1
    bucket.put(key, bytes(data))
    with pytest.raises(BadDigest, match=part):
        verify(bucket)


@pytest.mark.parametrize("part", ["deltas/step_000003", "folds/step_000004-000008", "anchors/step_000000"])
def test_a_payload_that_is_gone_is_named(bucket, part):
    bucket.delete(key_of(bucket, part))
    with pytest.raises(NotFound, match=part):
        verify(bucket)


def test_a_fold_that_is_sound_in_itself_but_leads_elsewhere_is_found(bucket):
    key = key_of(bucket, "derived/fold-000000-000004")
    record = read(Derived, bucket.get(key, limit=1 << 20), where=key)
    delta = decode(bucket.get(f"runs/{record.run}/{record.payloads[0].key}", limit=1 << 20))
    forged = delta + Delta({"norm": delta["norm"]})
    data = encode(forged, run=record.run, parent=0, version=4)
    payload = Payload(fold_key(0, 4, blake3(data).hexdigest()), len(data), blake3(data).hexdigest())
    bucket.delete(key)
    bucket.put(f"runs/{record.run}/{payload.key}", data)
    forgery = msgspec.structs.replace(record, payloads=(payload,))
    bucket.put(derived_key(record.run, 0, 4, forgery.payloads), write(forgery))
    with pytest.raises(BadDigest, match=r"fold-000000-000004.*1 tensors differ \(norm\)"):
        verify(bucket)


def test_an_anchor_of_other_weights_is_found(bucket, tmp_path):
    key = key_of(bucket, "derived/anchor-000008")
    record = read(Derived, bucket.get(key, limit=1 << 20), where=key)
    (path,) = checkpoint.write(tmp_path, table(served(model(1))), served(model(1)))
    data = path.read_bytes()
    payload = Payload(record.payloads[0].key, len(data), blake3(data).hexdigest())
    bucket.put(f"runs/{record.run}/{payload.key}", data)
    bucket.put(key, write(msgspec.structs.replace(record, payloads=(payload,))))
    with pytest.raises(BadDigest, match=r"anchor-000008.*tensors differ"):
        verify(bucket)


@pytest.mark.parametrize(
    ("part", "change", "kind", "says"),
    [
        ("anchor-000008", {"commit_hash": "0" * 64}, Forked, "is the anchor of another commit 8"),
        ("fold-000000-000004", {"commit_hash": "0" * 64}, Forked, "is the fold of another commit 4"),
        ("fold-000000-000004", {"parent_hash": "0" * 64}, Forked, "its parent was rewritten"),
        ("fold-000000-000004", {"root": "0" * 64}, BadDigest, "its root or its digests are not those of version 4"),
        ("fold-000000-000004", {"digests": {}}, FormatError, "changes other tensors"),
    ],
)
def test_a_fold_or_anchor_that_says_something_else_than_its_commits_is_found(bucket, part, change, kind, says):
    key = key_of(bucket, f"derived/{part}")
    record = read(Derived, bucket.get(key, limit=1 << 20), where=key)
    bucket.put(key, write(msgspec.structs.replace(record, **change)))
    with pytest.raises(kind, match=says):
        verify(bucket)


def test_a_delta_that_is_sound_in_itself_but_leads_elsewhere_is_found(bucket):
    key = key_of(bucket, "deltas/step_000003")
    delta = decode(bucket.get(key, limit=1 << 20))
    run, name = key.split("/")[1], next(iter(delta))
    data = encode(delta + Delta({name: delta[name]}), run=run, parent=2, version=3)
    payload = Payload(key.removeprefix(f"runs/{run}/"), len(data), blake3(data).hexdigest())
    bucket.put(key, data)
    replace_commit(bucket, 3, lambda commit: msgspec.structs.replace(commit, payloads=(payload,)))
    with pytest.raises(BadDigest, match=rf"commits/000003.*this delta does not join version 3.*\({re.escape(name)}\)"):
        verify(bucket)


def test_weights_are_digested_anew_at_the_end(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def spoil(edge, total):
        if (edge.kind, edge.end) == ("anchor", 8):  # what is read last
            (file,) = tmp_path.glob("deltawire-*/model.safetensors")
            with open(file, "r+b") as weights:
                weights.seek(-1, os.SEEK_END)
                weights.write(b"\x7f")

    with pytest.raises(BadDigest, match="1 tensors differ from the commit"):
        verify(bucket, on_read=spoil)


def test_a_newest_commit_that_is_gone_is_missed(bucket):
    bucket.delete(key_of(bucket, "commits/000008"))
    with pytest.raises(Gap, match=r"HEAD\.json names version 8, but the newest commit listed is 7"):
        verify(bucket)


def test_a_run_that_is_pruned_meanwhile_is_verified_from_its_new_start(bucket):
    run = key_of(bucket, "run.json").split("/")[1]

    def prune(edge, total):
        if edge.end == 2:
            retention.carry_out(bucket, retention.find_prunable(bucket, run, retention.Policy(1, 0)))

    report = verify(bucket, on_read=prune)
    assert (report.first, report.anchors, report.deltas) == (8, 1, 0)


def test_what_was_pruned_is_not_asked_for(bucket):
    with_all = verify(bucket)
    run = with_all.position.run
    retention.carry_out(bucket, retention.find_prunable(bucket, run, retention.Policy(1, 0)))
    report = verify(bucket)
    assert (report.first, report.position, report.anchors, report.deltas) == (8, with_all.position, 1, 0)


def test_a_run_on_a_base_of_this_host_is_verified_and_the_base_is_not_written(tmp_path):
    weights, bucket = model(), fresh()
    (tmp_path / "base").mkdir()
    (file,) = checkpoint.write(tmp_path / "base", table(served(weights)), served(weights))
    before = file.read_bytes()
    steps = [model(seed) for seed in (1, 2)]
    publish_all(bucket, *steps, base=tmp_path / "base")
    report = verify(bucket, base=tmp_path / "base")
    assert (report.anchors, report.deltas) == (1, 2)
    assert file.read_bytes() == before
    rest = {name: bits for name, bits in served(weights).items() if name != "norm"}
    checkpoint.write(tmp_path / "base", table(rest), rest)
    with pytest.raises(FormatError, match="lacks tensor 'norm'"):
        verify(bucket, base=tmp_path / "base")
    checkpoint.write(tmp_path / "base", table(served(weights)), served(model(3)))
    with pytest.raises(BadDigest, match="this anchor does not join"):
        verify(bucket, base=tmp_path / "base")


def test_records_of_a_key_that_is_not_trusted_are_refused(tmp_path):
    key, stranger = (signing.generate_key(tmp_path / name).public for name in ("key", "stranger"))
    bucket = fresh()
    publish_all(bucket, model(), model(1), signing_key=tmp_path / "key")
    assert verify(bucket, trusted=[key]).deltas == 1
    with pytest.raises(BadSignature):
        verify(bucket, trusted=[stranger])
