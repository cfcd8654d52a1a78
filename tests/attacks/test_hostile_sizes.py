"""A bucket that claims to be large gets neither memory nor disk: every size is held against the run's table first."""

import os
import resource
import shutil
import tempfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from runs import chain_of_four, commits, fresh, model, publish_all, read_weights, served, table

from attacks.hostile import add, anchor_of, begin, claim, continued
from deltawire import Subscriber, materialize, open_bucket, verify
from deltawire.buckets.wrappers import Counting
from deltawire.errors import DeltaWireError, NotFound, OutOfSpace, TooLarge
from deltawire.format import delta_file
from deltawire.runlog import bounds
from deltawire.runlog.keys import HEAD_KEY
from deltawire.upkeep import proofs
from deltawire.upkeep.compactor import Compactor
from deltawire.weights.delta import Delta, TensorDelta
from deltawire.weights.table import TensorEntry
from deltawire.weights.tensors import equal

GIB = 1 << 30
WEIGHTS = served(model())
DIGEST = "0" * 16


@pytest.fixture(autouse=True)
def little_memory():
    """A test that takes 2 GiB more of memory fails instead of taking it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2 * GIB, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """A TMPDIR of its own; what is left there after a refusal is nothing."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def fetched(bucket):
    """Read the newest version from nothing, through a bucket that counts."""
    metered = Counting(bucket)
    with Subscriber(metered) as subscriber:
        try:
            subscriber.change(None, subscriber.latest().version)
        finally:
            assert metered.traffic.bytes_down < 1 << 20
    return metered


@pytest.mark.parametrize("claims", [[3 * GIB], [4 << 20] * 700, [1] * 20_000], ids=["one", "many", "tiny"])
def test_a_commit_that_claims_more_than_its_tensors_take_is_refused_before_a_byte(claims):
    bucket = fresh()
    publish_all(bucket, model())
    (first,) = commits(bucket)
    payloads = tuple(claim(f"deltas/step_000001-{number:012x}.safetensors", size) for number, size in enumerate(claims))
    add(bucket, continued(first, digests={"norm": DIGEST}, payloads=payloads))
    with Subscriber(bucket) as subscriber, pytest.raises(TooLarge, match=r"claims|lists"):
        subscriber.fetch_delta(subscriber.recent(1)[0])


@pytest.mark.parametrize(
    "claims",
    [[("model.safetensors", 3 * GIB)], [("config.json", 3 * GIB)], [(f"{n}.json", 64 << 20) for n in range(20)]],
    ids=["weights", "an asset", "many assets"],
)
@pytest.mark.parametrize("reader", ["change", "prove"])
def test_an_anchor_that_claims_more_than_its_tensors_take_is_refused_before_a_byte(temporary, claims, reader):
    bucket, _ = chain_of_four()
    last = commits(bucket)[-1]
    with Subscriber(bucket) as subscriber:
        digests = {name: f"{value:016x}" for name, value in subscriber.digests_at(3).items()}
    payloads = [claim(f"anchors/step_000003-{'0' * 12}/{name}", size) for name, size in claims]
    key = anchor_of(bucket, last, digests, payloads)
    with Subscriber(bucket) as subscriber:
        edges = {edge.record: edge for edge in subscriber.chain.edges()}
        if reader == "prove":
            for payload in payloads:
                bucket.put(f"runs/{last.run}/{payload.key}", b"?")
            assert isinstance(proofs.Proofs(subscriber).problem(edges[key]), TooLarge)
        else:
            with pytest.raises(TooLarge, match=r"claims|beside"):
                subscriber.open_anchor(subscriber.chain.read([edges[key]])[0].filed.record)
    assert equal(read_weights(bucket), read_weights(bucket, 3))  # everybody begins elsewhere
    assert list(temporary.iterdir()) == []


def of_zeros(elements):
    """A run whose anchor is a change of one of so many zeros: about a kilobyte."""
    bucket, entry = fresh(), TensorEntry("w", "BF16", (elements,))
    one = TensorDelta("BF16", (elements,), np.zeros(1, np.int64), np.ones(1, np.uint16))
    first = begin(bucket, [entry])
    data = delta_file.encode(Delta({"w": one}), codec="gap", run=first.run, version=0)
    assert len(data) < 1200
    bucket.put(f"runs/{first.run}/anchors/step_000000-{'0' * 12}/r000.safetensors", data)
    payload = claim(f"anchors/step_000000-{'0' * 12}/r000.safetensors", len(data))
    payload = type(payload)(payload.key, payload.size, blake3(data).hexdigest())
    add(bucket, continued(first, version=0, parent=None, payloads=(payload,), digests=first.digests,
                          parent_hash=first.parent_hash))  # fmt: skip
    return bucket


READERS = {
    "change": lambda bucket, out: fetched(bucket),
    "materialize": materialize,
    "verify": lambda bucket, out: verify(bucket),
    "resume": lambda bucket, out: publish_all(bucket, {"w": np.zeros(3, np.float32)}),
}


@pytest.mark.parametrize("elements", [1 << 46, (1 << 48) - 1])
@pytest.mark.parametrize("reader", READERS)
def test_declared_zeros_that_no_disk_holds_are_refused_before_they_are_written(tmp_path, temporary, reader, elements):
    with pytest.raises(OutOfSpace, match="are needed"):
        READERS[reader](of_zeros(elements), tmp_path / "out")
    assert sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file()) < 1 << 20


def test_declared_zeros_do_not_fill_a_disk_that_is_nearly_full(tmp_path, temporary, monkeypatch):
    usage = namedtuple("usage", "total used free")(8 << 20, 7 << 20, 1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutOfSpace, match="1,048,576 are free"):
        fetched(of_zeros(1 << 20))
    assert sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file()) < 4096


def test_declared_zeros_that_fit_are_read(temporary):
    bucket = of_zeros(3 << 20)
    with Subscriber(bucket) as subscriber:
        weights = subscriber.read_anchor(subscriber.recent(1)[0])
        assert weights["w"].data[0] == 1
        assert not weights["w"].data[1:].any()


def test_a_change_that_no_memory_holds_is_refused_before_it_is_decoded():
    delta = Delta({"w": TensorDelta("BF16", (1 << 20,), np.arange(1000), np.ones(1000, np.uint16))})
    specs = delta_file.read_header(delta_file.encode(delta)).tensors
    bounds.require_memory(specs, "it", available=10_000)
    with pytest.raises(TooLarge, match="10,000 bytes of memory to decode, and this host has 9,999"):
        bounds.require_memory(specs, "it", available=9_999)


# Folders that hold more than files


@pytest.fixture
def folder(tmp_path):
    """A file:// bucket with one version, and its folder."""
    bucket = open_bucket((tmp_path / "bucket").as_uri(), create=True)
    publish_all(bucket, model())
    return bucket, tmp_path / "bucket"


@pytest.mark.parametrize("what", ["a device", "a pipe", "a folder", "a link in a circle"])
def test_what_is_no_regular_file_is_no_object(folder, tmp_path, what):
    bucket, root = folder
    path = root / "replicas" / "x.json"
    path.parent.mkdir()
    make = {
        "a device": lambda: path.symlink_to("/dev/zero"),
        "a pipe": lambda: os.mkfifo(path),
        "a folder": path.mkdir,
        "a link in a circle": lambda: path.symlink_to(path),
    }
    make[what]()
    for ask in (
        bucket.stat,
        lambda key: bucket.get(key, limit=1 << 20),
        lambda key: bucket.get_file(key, tmp_path / "out", limit=1 << 20),
    ):
        with pytest.raises(DeltaWireError):
            ask("replicas/x.json")
    assert list(bucket.list("replicas/")) == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_a_head_or_an_anchor_without_an_end_holds_nobody_up(folder, tmp_path, make):
    bucket, root = folder
    (root / HEAD_KEY).unlink()
    make(root / HEAD_KEY)
    assert equal(read_weights(bucket), WEIGHTS)
    (anchor,) = (root / "runs").rglob("model.safetensors")
    anchor.unlink()
    make(anchor)
    with pytest.raises(NotFound, match=r"model\.safetensors"):
        read_weights(bucket)


def test_a_link_to_a_regular_file_is_read(folder):
    bucket, root = folder
    head = root / HEAD_KEY
    head.rename(root / "elsewhere")
    head.symlink_to(root / "elsewhere")
    assert equal(read_weights(bucket), WEIGHTS)


def test_a_file_that_grows_while_it_is_read_has_the_size_it_had(tmp_path, monkeypatch):
    bucket = open_bucket((tmp_path / "bucket").as_uri(), create=True)
    bucket.put("a", b"12345")
    growing = open_bucket(bucket.url)
    size_within = growing._size_within

    def grow(limit, file, key):
        size = size_within(limit, file, key)
        with open(tmp_path / "bucket" / "a", "ab") as more:
            more.write(b"6" * 1000)
        return size

    monkeypatch.setattr(growing, "_size_within", grow)
    growing.get_file("a", tmp_path / "out", limit=5)
    assert (tmp_path / "out").read_bytes() == b"12345"


# Listings


@pytest.mark.parametrize("prefix", ["", "runs/"])
@pytest.mark.parametrize("store", ["file", "memory", "s3"])
def test_a_listing_stops_at_a_bound(request, tmp_path, monkeypatch, store, prefix):
    url = {"file": (tmp_path / "bucket").as_uri(), "memory": "memory://listed"}.get(store)
    bucket = open_bucket(url or request.getfixturevalue("s3_url"), create=store == "file")
    for number in range(30):
        bucket.put(f"runs/{number}", b"")
    assert len(list(bucket.list(prefix))) == 30
    monkeypatch.setattr("deltawire.buckets.base.MAX_LISTED", 20)
    with pytest.raises(TooLarge, match="more than 20 objects"):
        bucket.list(prefix)


def test_a_listing_of_the_hub_stops_at_a_bound_while_pages_come(monkeypatch):
    pytest.importorskip("huggingface_hub")
    from types import SimpleNamespace

    from deltawire.buckets.hub import HubBucket

    def pages(*arguments, **options):
        number = 0
        while True:
            yield SimpleNamespace(type="file", path=f"runs/{number}")
            number += 1

    bucket = HubBucket("me/name", endpoint="http://127.0.0.1:1")
    monkeypatch.setattr(bucket._api, "list_bucket_tree", pages)
    monkeypatch.setattr("deltawire.buckets.base.MAX_LISTED", 1000)
    with pytest.raises(TooLarge, match="more than 1,000 objects"):
        bucket.list("runs/")


def test_a_compactor_makes_no_anchor_that_readers_would_refuse(tmp_path, monkeypatch):
    bucket, _ = chain_of_four()
    monkeypatch.setattr(bounds, "MAX_PAYLOADS", 0)
    with Compactor(bucket, tmp_path / "mirror", anchors=1) as compactor, pytest.raises(TooLarge):
        compactor.step()


def test_assets_that_no_reader_would_fetch_are_refused_when_the_trainer_opens(tmp_path):
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(bounds.MAX_ASSET + 1)
    with pytest.raises(TooLarge, match=r"tokenizer\.json is 134,217,729 bytes"):
        publish_all(fresh(), model(), assets=tmp_path)


def test_the_bound_is_above_what_the_codecs_write():
    rng = np.random.default_rng(0)
    for dtype, width in (("U8", np.uint8), ("BF16", np.uint16), ("F32", np.uint32), ("F64", np.uint64)):
        for total, share in ((1, 1.0), (7, 1.0), (4096, 0.001), (100_000, 0.1), (100_000, 1.0)):
            positions = np.flatnonzero(rng.random(total) < share) if share < 1 else np.arange(total)
            steps = rng.integers(1, np.iinfo(width).max, positions.size, dtype=width, endpoint=True)
            name = 'a "quoted" name\\ω\x01' * 5
            data = delta_file.encode(Delta({name: TensorDelta(dtype, (total, 1, 1), positions, steps)}), run="0" * 16)
            entries = table({name: delta_file.decode(data)[name]})
            assert len(data) <= bounds.most_bytes(entries, 1)
