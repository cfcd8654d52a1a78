"""Each fault happens as scheduled, and nothing else changes."""

import uuid

import pytest

from deltawire.buckets import open_bucket
from deltawire.buckets.conformance import BucketTests
from deltawire.buckets.faulty import Fault, Faulty, at, seeded
from deltawire.errors import AlreadyExists, NotFound, Unavailable


def memory():
    return open_bucket(f"memory://{uuid.uuid4()}")


class TestWithoutFaults(BucketTests):
    @pytest.fixture
    def bucket(self):
        return Faulty(memory(), lambda call: None)


@pytest.fixture
def store():
    return memory()


def test_a_write_that_fails_before_did_nothing_and_one_that_fails_after_did_all(store):
    bucket = Faulty(store, at("put", "a", "fail before"))
    with pytest.raises(Unavailable, match="injected"):
        bucket.put("a", b"1")
    with pytest.raises(NotFound):
        store.stat("a")
    bucket.schedule = at("put", "a", "fail after")
    with pytest.raises(Unavailable, match="acknowledgement is lost"):
        bucket.put("a", b"1")
    assert store.get("a", limit=9) == b"1"
    assert bucket.injected == {"fail before": 1, "fail after": 1}


def test_reads_are_damaged_and_the_object_is_not(store, tmp_path):
    store.put("a", b"123")
    bucket = Faulty(store, lambda call: Fault("truncate"))
    bucket.get_file("a", tmp_path / "a", limit=9)
    assert bucket.get("a", limit=9) == b"12" == (tmp_path / "a").read_bytes()
    bucket.schedule = lambda call: Fault("flip")
    bucket.get_file("a", tmp_path / "a", limit=9)
    for seen in (bucket.get("a", limit=9), (tmp_path / "a").read_bytes()):
        assert sum(one != other for one, other in zip(seen, b"123", strict=True)) == 1
    assert store.get("a", limit=9) == b"123"


def test_stale_answers_are_those_of_before(store):
    bucket = Faulty(store, lambda call: None)
    store.put("a", b"1")
    first, listed, read = bucket.stat("a"), [*bucket.list()], bucket.get("a", limit=9)
    store.put("a", b"22")
    store.put("b", b"1")
    bucket.schedule = lambda call: Fault("stale")
    assert bucket.stat("a") == first
    assert bucket.get("a", limit=9) == read == b"1"
    assert [*bucket.list()] == listed
    bucket.schedule = lambda call: None
    assert bucket.stat("a").size == 2


def test_a_late_duplicate_overwrites_what_came_after_it(store):
    bucket = Faulty(store, at("put", "HEAD", "late duplicate"))
    bucket.put("HEAD", b"old")
    bucket.put("HEAD", b"new")
    assert store.get("HEAD", limit=9) == b"old"


def test_where_writes_are_conditional_a_late_duplicate_is_refused_by_the_store(store):
    bucket = Faulty(store, at("put_new", "a", "late duplicate"))
    bucket.put_new("a", b"1")
    with pytest.raises(AlreadyExists):
        bucket.put_new("a", b"2")
    assert store.get("a", limit=9) == b"1"


def test_a_partial_batch_does_the_first_and_fails(store):
    for key in "abc":
        store.put(key, b"1")
    with pytest.raises(Unavailable, match="partial"):
        Faulty(store, at("delete", "a", "partial")).delete("a", "b", "c")
    assert [stat.key for stat in store.list()] == ["b", "c"]


def test_a_delay_takes_its_time_and_a_429_says_so(store):
    slept = []
    bucket = Faulty(store, at("put", "a", "delay", seconds=2.5), sleep=slept.append)
    bucket.put("a", b"1")
    assert slept == [2.5]
    bucket.schedule = at("get", "a", "throttle")
    with pytest.raises(Unavailable, match="429"):
        bucket.get("a", limit=9)
    assert bucket.get("a", limit=9) == b"1"


def test_the_same_seed_gives_the_same_faults():
    def play(seed):
        bucket = Faulty(memory(), seeded(seed, 0.5), sleep=lambda seconds: None)
        outcome = []
        for number in range(60):
            try:
                bucket.put(f"k{number % 7}", bytes([number]))
                outcome.append(bucket.get(f"k{number % 7}", limit=9))
            except Unavailable as error:
                outcome.append(str(error).rpartition("injected")[2])
        return outcome

    assert play(1) == play(1) != play(2)
