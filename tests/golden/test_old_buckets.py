"""Buckets that were written before the first release are followed, continued, compacted, pruned and verified today.

They are `tests/golden/buckets/*.zip`; make.py beside them says how they were made. Every test works on a copy.
"""

import zipfile
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from waiting import PATIENCE

from deltawire import Publisher, Subscriber, digest, materialize, open_bucket, verify
from deltawire.errors import BadSignature
from deltawire.format.checkpoint import Checkpoint
from deltawire.runlog.signing import read_key
from deltawire.upkeep.compactor import Compactor
from deltawire.upkeep.retention import Policy, carry_out, find_prunable
from deltawire.weights.bits import Bits
from deltawire.weights.tensors import equal

GOLDEN = Path(__file__).parent / "buckets"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.zip"))
VERSIONS = [0, 1, 2, 3, 4, 5, 7]
NEWEST = Policy(anchors=1, hours=-1.0)


class Old:
    """A copy of an old bucket, what its versions are, and what its readers and writers need."""

    def __init__(self, name, folder):
        with zipfile.ZipFile(GOLDEN / f"{name}.zip") as archive:
            archive.extractall(folder)
        self.url, self.folder, self.right = (folder / "bucket").as_uri(), folder, {}
        for key, data in np.load(folder / "expected.npz").items():
            version, tensor = key.split("/")
            bits = Bits("F32" if data.itemsize == 4 else "BF16", data.shape, data.reshape(-1))
            self.right.setdefault(int(version), {})[tensor] = bits
        self.bucket = open_bucket(self.url)
        self.base = {"base": folder / "base"} if (folder / "base").is_dir() else {}
        keys = [read_key(path).public for path in sorted(folder.glob("*.pem"))]
        self.trained = self.right[0].keys() - ({"frozen.weight"} if self.base else set())
        self.trust = {"trusted": keys} if keys else {}
        self.reader = self.base | self.trust

    def key(self, of):
        path = self.folder / f"{of}.pem"
        return {"signing_key": path} if path.is_file() else {}

    def publisher(self):
        return Publisher(self.bucket, resume="require", **self.base, **self.key("trainer"))

    def compactor(self, **options):
        return Compactor(self.bucket, self.folder / "mirror", **self.reader, **self.key("compactor"), **options)

    def publish(self, *versions):
        """A trainer is restarted, and publishes small changes of the newest weights."""
        with self.publisher() as publisher:
            assert publisher.position.version == max(self.right)
            for version in versions:
                weights = {name: bits.copy() for name, bits in self.right[max(self.right)].items()}
                weights["layer.weight"].data[version] ^= 1
                publisher.publish({name: bits for name, bits in weights.items() if name in self.trained})
                assert publisher.flush(PATIENCE).version == version
                self.right[version] = weights

    def run(self):
        with Subscriber(self.bucket, **self.reader) as subscriber:
            return subscriber.run.run


@pytest.fixture(params=NAMES)
def old(request, tmp_path):
    return Old(request.param, tmp_path)


def read_all(old, versions):
    """Every version as updates bring it."""
    held, seen = {}, []
    with Subscriber(old.bucket, **old.reader) as subscriber:
        for update in subscriber.updates():
            if update.anchor is not None:
                held = {entry.name: update.anchor[entry.name].copy() for entry in subscriber.run.table}
            else:
                update.delta.apply_(held)
            seen.append(update.position.version)
            assert digest(held) == update.digests
            assert equal(held, old.right[update.position.version])
    assert seen == [version for version in versions if version >= seen[0]]
    return seen


def test_there_are_three_kinds_of_old_buckets():
    assert NAMES == ["based", "sharded", "signed"]


def test_every_change_between_two_versions_of_an_old_bucket_is_right(old):
    with Subscriber(old.bucket, **old.reader) as subscriber:
        assert [commit.version for commit in subscriber.commits()] == VERSIONS
        assert [commit.step for commit in subscriber.commits()] == [10 * version for version in VERSIONS]
        folds = 0
        for start, end in [*permutations(VERSIONS, 2), *((None, version) for version in VERSIONS)]:
            here = None if start is None else subscriber.position_at(start)
            change = subscriber.change(here, end)
            held = old.right[start] if change.anchor is None else {name: change.anchor[name] for name in old.right[0]}
            assert equal({name: bits.copy() for name, bits in held.items()} + change.delta, old.right[end])
            folds += any("fold" in key for key in change.derived)
        assert folds


@pytest.mark.parametrize("version", VERSIONS)
def test_any_version_of_an_old_bucket_is_materialized_and_moved_from(old, version):
    out = old.folder / "out"
    assert materialize(old.bucket, out, version, **old.reader).position.version == version
    assert equal({name: Checkpoint(out)[name] for name in old.right[0]}, old.right[version])
    assert materialize(old.bucket, out, 4, **old.reader).position.version == 4
    assert equal({name: Checkpoint(out)[name] for name in old.right[0]}, old.right[4])


def test_all_of_an_old_bucket_verifies(old):
    report = verify(old.bucket, **old.reader)
    assert (report.position.version, report.deltas, report.folds, report.junk) == (7, 6, 3, 0)
    assert report.anchors == 2


def test_an_old_signature_is_checked(tmp_path):
    old = Old("signed", tmp_path)
    with Subscriber(old.bucket, trusted=["0" * 64]) as subscriber, pytest.raises(BadSignature):
        subscriber.latest()
    with pytest.raises(BadSignature):
        Publisher(old.bucket)


def test_a_trainer_continues_an_old_bucket_and_every_reader_follows(old):
    old.publish(8, 9)
    old.publish(10)
    assert read_all(old, [*VERSIONS, 8, 9, 10])[-1] == 10
    assert verify(old.bucket, **old.reader).deltas == 9


def test_an_old_bucket_is_compacted_and_pruned_and_goes_on(old):
    old.publish(8, 9)
    with old.compactor(levels=(2, 4, 8), anchors=2) as compactor:
        written = {(report.parent, report.version) for report in compactor.step()}
        assert compactor.step() == []
    assert {(0, 8), (4, 8), (None, 9)} <= written
    report = verify(old.bucket, **old.reader)
    assert (report.junk, report.anchors) == (0, 3)
    found = find_prunable(old.bucket, old.run(), NEWEST, trusted=old.trust.get("trusted", ()))
    assert (found.floor, found.passed_over) == (9, ())
    carry_out(old.bucket, found)
    old.publish(10)
    assert read_all(old, [9, 10]) == [9, 10]
    assert verify(old.bucket, **old.reader).first == 9


def test_an_old_bucket_is_pruned_as_it_is(old):
    found = find_prunable(old.bucket, old.run(), NEWEST, trusted=old.trust.get("trusted", ()))
    assert (found.floor, found.passed_over) == (7, ())
    carry_out(old.bucket, found)
    assert {stat.key.split("/")[2] for stat in old.bucket.list("runs/")} == {
        "anchors",
        "commits",
        "derived",
        "run.json",
    }
    assert read_all(old, [7]) == [7]
    old.publish(8)
    assert read_all(old, [7, 8]) == [7, 8]


def test_a_module_follows_an_old_bucket_and_is_pinned_to_an_older_version(old):
    torch = pytest.importorskip("torch")
    from deltawire.torch import follow

    model = torch.nn.Module()
    for name, bits in old.right[0].items():
        *path, leaf = name.split(".")
        part = model
        for step in path:
            part.add_module(step, getattr(part, step, torch.nn.Module()))
            part = getattr(part, step)
        kind = torch.float32 if bits.dtype == "F32" else torch.bfloat16
        part.register_parameter(leaf, torch.nn.Parameter(torch.zeros(bits.shape, dtype=kind)))
    with follow(model, old.url, **old.reader) as follower:
        for version in (None, 3, 0, 5, None):
            assert follower.step(version).version == (7 if version is None else version)
            assert equal(dict(model.named_parameters()), old.right[7 if version is None else version])
