"""The readers of a host fetch each payload once, whatever dies, rots or fills up; none believes its cache."""

import errno
import mmap
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from blake3 import blake3
from programs import program
from runs import chain_of_four, edit, model, publish_all, read_weights
from small_s3 import small_s3

from deltawire import open_bucket
from deltawire.buckets.wrappers import Counting
from deltawire.errors import FormatError, Unavailable
from deltawire.format import delta_file
from deltawire.read import entries
from deltawire.read.host_cache import GIB, HostCache, cache_folder, host_cache
from deltawire.weights.tensors import equal

GOLDEN = Path(__file__).parents[1] / "golden" / "buckets"
LONG = 120
"""seconds for processes that import all of deltawire"""


@pytest.fixture
def cache(tmp_path):
    return HostCache(tmp_path / "cache")


def payloads(bucket):
    """How often each payload was fetched."""
    return {key: count for key, count in bucket.fetched.items() if "/deltas/" in key or "/anchors/" in key}


def keys(bucket):
    """The keys of all deltas."""
    return [stat.key for stat in bucket.list("runs/") if "/deltas/" in stat.key]


class Fetched(Counting):
    """A bucket that counts the fetches of each key."""

    def __init__(self, bucket):
        super().__init__(bucket)
        self.fetched = {}

    def get(self, key, *, limit):
        self.fetched[key] = self.fetched.get(key, 0) + 1
        return super().get(key, limit=limit)

    def get_file(self, key, path, *, limit):
        self.fetched[key] = self.fetched.get(key, 0) + 1
        super().get_file(key, path, limit=limit)


@pytest.fixture
def chain():
    """Four versions behind a bucket that counts, and their bits."""
    bucket, versions = chain_of_four()
    return Fetched(bucket), versions


def files(cache):
    return [path for path in cache.folder.rglob("*") if path.is_file() and path.name != "lock"]


def run_program(*arguments):
    done = subprocess.run([sys.executable, program("share_host"), *arguments], check=False, timeout=LONG)
    return done.returncode


def test_eight_processes_of_a_host_fetch_each_payload_once_though_one_was_killed_in_the_middle(tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAWIRE_CACHE", str(tmp_path / "cache"))
    weights, steps = model(), []
    for step in range(3):
        edit(weights, step)
        steps.append({name: tensor.copy() for name, tensor in weights.items()})
    with small_s3() as store:
        url = "s3://weights/run"
        publish_all(open_bucket(url), *steps)
        killed = subprocess.Popen([sys.executable, program("share_host"), url, "0"], stdout=subprocess.PIPE)
        with killed:
            assert killed.stdout.readline() == b"halfway\n"
            killed.kill()
        before = len(store.asked)
        assert run_program(url, "8") == 0
        asked = [one.key for one in store.asked[before:] if one.method == "GET"]
        deltas = [key for key in store.objects if "/deltas/" in key]
        assert sorted(key for key in asked if "/deltas/" in key) == sorted(deltas)
        assert not [key for key in asked if "/anchors/" in key], "the one that was killed had fetched it"
        total = sum(map(len, (store.objects[key] for key in deltas)))
    kept = HostCache(tmp_path / "cache")
    assert sum(path.stat().st_size for path in files(kept) if path.name == "data") == total
    assert kept.folder.stat().st_mode & 0o777 == 0o700


def test_readers_in_one_process_share_as_well(chain, cache):
    bucket, versions = chain
    with ThreadPoolExecutor(4) as pool:
        for held in pool.map(lambda _: read_weights(bucket, cache=cache), range(4)):
            assert equal(held, versions[3])
    assert set(payloads(bucket).values()) == {1}


def test_a_damaged_file_is_fetched_again_and_the_next_reader_finds_it_whole(chain, cache):
    bucket, versions = chain
    read_weights(bucket, cache=cache)
    for path in files(cache):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert equal(read_weights(bucket, cache=cache), versions[3])
    assert set(payloads(bucket).values()) == {2}
    for path in files(cache):
        os.truncate(path, 3)
    assert equal(read_weights(bucket, cache=cache), versions[3])
    assert equal(read_weights(bucket, cache=cache), versions[3])
    assert set(payloads(bucket).values()) == {3}


def test_a_payload_is_mapped_and_stays_readable_when_it_is_removed_replaced_or_fetched_again(chain, cache):
    bucket, _ = chain
    (key, data), *_ = ((key, bucket.get(key, limit=1 << 20)) for key in keys(bucket))
    sealed = blake3(data).hexdigest()
    held = [cache.get_verified(bucket, key, size=len(data), blake3=sealed) for _ in range(2)]
    assert all(isinstance(view.obj, mmap.mmap) and view.readonly for view in held)
    assert cache.remove(cache.folder / sealed)
    held.append(cache.get_verified(bucket, key, size=len(data), blake3=sealed))
    (path,) = files(cache)
    damaged = path.with_name("damaged")
    damaged.write_bytes(data[::-1])
    damaged.replace(path)
    held.append(cache.get_verified(bucket, key, size=len(data), blake3=sealed))
    assert [bytes(view) == data for view in held] == [True] * 4
    assert delta_file.open_file(held[0]).names == delta_file.open_file(data).names


def test_what_was_put_together_of_a_sharded_anchor_is_shared_and_made_again_when_damaged(cache, tmp_path):
    shutil.unpack_archive(GOLDEN / "sharded.zip", tmp_path / "old")
    bucket = Fetched(open_bucket((tmp_path / "old" / "bucket").as_uri()))
    alone = read_weights(bucket, 0)
    bucket.fetched.clear()
    assert equal(read_weights(bucket, 0, cache=cache), alone)
    assert equal(read_weights(bucket, 0, cache=cache), alone)
    assert set(payloads(bucket).values()) == {1}
    (whole,) = [path for path in files(cache) if path.parent.name == "whole" and path.suffix == ".safetensors"]
    data = whole.read_bytes()
    whole.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert equal(read_weights(bucket, 0, cache=cache), alone)
    assert max(payloads(bucket).values()) == 2


def test_a_download_that_broke_off_goes_on_with_the_whole_files_it_had(cache):

    def fill(folder):
        for name in ("one", "two"):
            if not (folder / name).exists():
                got.append(name)
                if got == ["one", "two"]:
                    (folder / ".two.part").write_bytes(b"tw")
                    raise Unavailable("the store went away")
                (folder / name).write_bytes(name.encode())

    got = []
    with pytest.raises(Unavailable):
        cache.hold("entry", 20, fill, source="a bucket")
    with cache.hold("entry", 20, fill, source="a bucket") as held:
        assert sorted(path.name for path in held.path.iterdir()) == ["one", "two"]
    assert got == ["one", "two", "two"]


@pytest.mark.parametrize("late", [False, True], ids=["before", "in the middle"])
def test_on_a_full_disk_a_reader_fetches_for_itself(chain, cache, monkeypatch, late):
    bucket, versions = chain
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if late:
        original = Path.rename

        def rename(self, target):
            if self.is_relative_to(cache.folder):
                raise full
            return original(self, target)

        monkeypatch.setattr(Path, "rename", rename)
    else:
        usage, usual = shutil.disk_usage("/")._replace(free=0), shutil.disk_usage
        near = str(cache.folder)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage if near in str(path) else usual(path))
    assert equal(read_weights(bucket, cache=cache), versions[3])
    assert list(cache.folder.rglob("content")) == []


def test_a_folder_that_others_may_read_is_not_used_and_a_warning_says_so_once(chain, cache, caplog):
    bucket, versions = chain
    cache.folder.mkdir(parents=True, mode=0o755)
    cache.folder.chmod(0o755)
    assert equal(read_weights(bucket, cache=cache), versions[3])
    assert list(cache.folder.iterdir()) == []
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == ["chmod 700 it"]


def put(cache, name, size, source="a bucket"):
    return cache.hold(name, size, lambda folder: (folder / "data").write_bytes(bytes(size)), source=source)


def names(cache):
    return sorted(path.name for path in cache.folder.iterdir())


def test_what_was_used_longest_ago_goes_first_and_never_what_is_held(tmp_path):
    cache = HostCache(tmp_path, 100)
    for number, name in enumerate("abc"):
        put(cache, name, 30).close()
        os.utime(cache.folder / name / "lock", (number, number))
    with put(cache, "a", 30):
        put(cache, "d", 30).close()
        assert names(cache) == ["a", "c", "d"]
    os.utime(cache.folder / "a" / "lock", (0, 0))
    with put(cache, "a", 30), put(cache, "c", 30), put(cache, "d", 30), put(cache, "e", 30) as last:
        assert last.path.is_dir()
        assert names(cache) == ["a", "c", "d", "e"], "all of these are read"
    put(cache, "f", 30).close()
    assert len(names(cache)) == 3


def test_what_is_larger_than_the_limit_stays_while_somebody_holds_it(tmp_path):
    cache = HostCache(tmp_path, 100)
    put(cache, "small", 30).close()
    first, second = put(cache, "anchor", 1000), put(cache, "anchor", 1000)
    first.close()
    put(cache, "other", 30).close()
    assert names(cache) == ["anchor", "other", "small"]
    second.close()
    assert names(cache) == ["other", "small"]


def test_one_that_stands_still_is_not_waited_for_and_one_that_gets_on_is(tmp_path):
    cache, began, end = HostCache(tmp_path, patience=0.2), threading.Event(), threading.Event()

    def fill(folder):
        began.set()
        assert end.wait(LONG)

    with ThreadPoolExecutor() as pool:
        slow = pool.submit(cache.hold, "entry", 1, fill, source="a bucket")
        assert began.wait(LONG)
        assert put(cache, "entry", 1) is None
        assert put(HostCache(tmp_path), "entry", 1, "another bucket") is None, "it may be faster than that one"
        patient = pool.submit(put, HostCache(tmp_path), "entry", 1)
        end.set()
        slow.result(LONG).close()
        with patient.result(LONG) as held:
            assert list(held.path.iterdir()) == [], "what the slow one put there"


def test_the_environment_chooses_the_folder_and_the_limit_or_turns_it_off(tmp_path):
    assert host_cache({"DELTAWIRE_CACHE": "off"}) is None
    chosen = host_cache({"DELTAWIRE_CACHE": str(tmp_path), "DELTAWIRE_CACHE_GIB": "0.5"})
    assert (chosen.folder.parent, chosen.limit) == (tmp_path, GIB // 2)
    assert host_cache({}).folder.parent == cache_folder()
    put(usual := host_cache({"DELTAWIRE_CACHE": str(tmp_path)}), "entry", 1).close()
    assert 0 < usual.limit <= 4 * GIB
    for wrong in ("much", "inf", "nan"):
        with pytest.raises(FormatError, match="DELTAWIRE_CACHE_GIB"):
            host_cache({"DELTAWIRE_CACHE_GIB": wrong})


def test_a_user_without_a_home_has_no_cache_and_every_module_is_imported():
    """As in a container whose user is a number alone. `Path.home` is what fails there."""
    code = """
import os, pathlib
for name in ("HOME", "XDG_CACHE_HOME", "DELTAWIRE_CACHE"):
    os.environ.pop(name, None)
os.path.expanduser = lambda path: path
import deltawire.cli
from deltawire.read.host_cache import host_cache
from deltawire.upkeep.proofs import default_memory
assert host_cache() is None
assert default_memory() is None
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=LONG)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("above", [1, 2], ids=["an entry", "all of it"])
def test_a_cache_that_somebody_removes_meanwhile_stops_no_reader(chain, cache, monkeypatch, above):
    bucket, versions = chain
    get_file = Fetched.get_file

    def removed(self, key, path, *, limit):
        get_file(self, key, path, limit=limit)
        if path.is_relative_to(cache.folder):
            shutil.rmtree(path.parents[above])

    monkeypatch.setattr(Fetched, "get_file", removed)
    assert equal(read_weights(bucket, cache=cache), versions[3])


def test_an_entry_that_is_removed_under_the_eyes_of_a_reader_is_filled_by_one_alone(cache, monkeypatch):
    put(cache, "entry", 3).close()
    asked, lock = [], entries.locked

    def locked(entry, *, alone, make=True):
        if make:
            asked.append(alone)
            if len(asked) == 1:
                assert cache.remove(entry)
        return lock(entry, alone=alone, make=make)

    monkeypatch.setattr("deltawire.read.host_cache.locked", locked)
    with put(cache, "entry", 3) as held:
        assert [path.name for path in held.path.iterdir()] == ["data"]
    assert asked == [False, True]


def test_a_file_of_somebody_else_in_the_cache_is_passed_over(chain, cache):
    bucket, versions = chain
    cache.folder.mkdir(parents=True, mode=0o700)
    (cache.folder / "notes").write_text("mine")
    for _ in range(2):
        assert equal(read_weights(bucket, cache=cache), versions[3])
    assert set(payloads(bucket).values()) == {1}
    assert (cache.folder / "notes").read_text() == "mine"


def test_a_sharded_anchor_of_one_that_was_killed_when_all_was_there_is_used(cache, tmp_path, monkeypatch):
    shutil.unpack_archive(GOLDEN / "sharded.zip", tmp_path / "old")
    bucket = Fetched(open_bucket((tmp_path / "old" / "bucket").as_uri()))
    alone = read_weights(bucket, 0)
    bucket.fetched.clear()
    rename = Path.rename

    def killed(self, target):
        if Path(target).name == "content":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            read_weights(bucket, 0, cache=cache)
    assert equal(read_weights(bucket, 0, cache=cache), alone)
    assert set(payloads(bucket).values()) == {1}


def test_a_name_is_the_hash_of_what_it_holds(chain, cache):
    bucket, _ = chain
    read_weights(bucket, cache=cache)
    for path in files(cache):
        if path.name == "data":
            assert path.parent.parent.name == blake3(path.read_bytes()).hexdigest()
