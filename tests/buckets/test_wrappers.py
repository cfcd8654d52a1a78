"""Buckets around a bucket: each conforms by itself, and nested."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from deltawire.buckets import Bucket, Counting, Prefix, Retry, Stat, Traffic, open_bucket
from deltawire.buckets.base import watch_by_polling
from deltawire.buckets.conformance import BucketTests
from deltawire.errors import AlreadyExists, FormatError, NotFound, Unavailable


def fresh() -> Bucket:
    return open_bucket(f"memory://{uuid.uuid4()}")


class TestPrefix(BucketTests):
    @pytest.fixture
    def bucket(self) -> Bucket:
        return Prefix(fresh(), "wordle/run-7")


class TestRetryAndCountingAroundAPrefix(BucketTests):
    @pytest.fixture
    def bucket(self) -> Bucket:
        return Retry(Counting(Prefix(fresh(), "run-7")))


class Faulty(Prefix):
    """A bucket that is Unavailable `failures` times, before or after having done what it was asked."""

    def __init__(self, failures: int, *, after: bool = False) -> None:
        super().__init__(fresh(), "faulty")
        self.failures, self.after, self.calls = failures, after, 0

    def fail(self) -> None:
        self.calls += 1
        if self.calls <= self.failures:
            raise Unavailable(f"call {self.calls}")

    def stat(self, key: str) -> Stat:
        self.fail()
        return super().stat(key)

    def put_new(self, key: str, data: bytes | Path) -> None:
        if self.after:
            super().put_new(key, data)
        self.fail()
        super().put_new(key, data)

    def list(self, prefix: str = "", *, after: str = "") -> Iterator[Stat]:
        yield from super().list(prefix, after=after)
        self.fail()


def test_a_prefix_shows_its_own_part_and_nothing_beside_it() -> None:
    whole = fresh()
    whole.put("run-7/HEAD.json", b"7")
    whole.put("run-70/HEAD.json", b"70")
    part = Prefix(whole, "run-7")
    assert [stat.key for stat in part.list()] == ["HEAD.json"]
    assert part.url == f"{whole.url}/run-7"
    with pytest.raises(NotFound, match=r"run-7/missing"):
        part.stat("missing")
    with pytest.raises(FormatError):
        part.get("../run-70/HEAD.json", limit=2)


@pytest.mark.parametrize("prefix", ["", "/", "a/", "/a", "../a"])
def test_an_unsafe_prefix_is_refused(prefix: str) -> None:
    with pytest.raises(FormatError):
        Prefix(fresh(), prefix)


def test_what_passes_in_time_is_never_seen() -> None:
    faulty, waits = Faulty(2), []
    Prefix.put(faulty, "key", b"x")
    assert Retry(faulty, attempts=3, sleep=waits.append).stat("key").size == 1
    assert faulty.calls == 3
    assert len(waits) == 2


def test_what_stays_unavailable_is_raised_as_it_came() -> None:
    faulty, waits = Faulty(9), []
    with pytest.raises(Unavailable, match="call 4"):
        Retry(faulty, attempts=4, first_wait=1.0, longest_wait=2.0, sleep=waits.append).stat("key")
    assert len(waits) == 3
    assert all(0 <= wait <= 2 for wait in waits)


def test_only_unavailable_is_asked_again() -> None:
    faulty = Faulty(0)
    with pytest.raises(NotFound):
        Retry(faulty, sleep=pytest.fail).stat("missing")
    assert faulty.calls == 1


def test_a_listing_that_breaks_off_is_given_once_and_whole() -> None:
    faulty = Faulty(1)
    for key in ("a", "b"):
        faulty.put(key, b"")
    assert [stat.key for stat in Retry(faulty, sleep=lambda _: None).list()] == ["a", "b"]
    assert faulty.calls == 2


def test_put_new_after_a_lost_acknowledgement_finds_its_own_object() -> None:
    faulty = Faulty(1, after=True)
    with pytest.raises(AlreadyExists):
        Retry(faulty, sleep=lambda _: None).put_new("commits/1", b"mine")
    assert faulty.get("commits/1", limit=4) == b"mine"


def test_traffic_is_counted_in_calls_and_payload_bytes(tmp_path: Path) -> None:
    bucket = Counting(fresh())
    source = tmp_path / "source"
    source.write_bytes(b"123")
    bucket.put("a", b"12345")
    bucket.put_new("b", source)
    bucket.get("a", limit=5)
    bucket.get_file("b", tmp_path / "out", limit=3)
    with pytest.raises(AlreadyExists):
        bucket.put_new("b", b"not counted")
    assert bucket.traffic == Traffic(calls=5, bytes_up=8, bytes_down=8)


class Clock:
    """Time that passes only in `sleep`."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_watching_never_sleeps_longer_than_polite_nor_past_its_time() -> None:
    clock, bucket = Clock(), fresh()
    assert watch_by_polling(bucket, "key", tag=None, timeout=1.2, clock=clock, sleep=clock.sleep) is None
    assert clock.slept == pytest.approx([0.5, 0.5, 0.2])


def test_a_watcher_woken_early_looks_at_once() -> None:
    clock, bucket = Clock(), fresh()

    def woken(seconds: float) -> None:
        clock.sleep(0.01)
        bucket.put("key", b"x")

    found = watch_by_polling(bucket, "key", tag=None, timeout=60, clock=clock, sleep=woken)
    assert found == bucket.stat("key")
    assert clock.now == pytest.approx(0.01)


def test_a_change_in_the_last_moment_is_seen() -> None:
    clock, bucket = Clock(), fresh()

    def change_late(seconds: float) -> None:
        clock.sleep(seconds)
        if clock.now >= 1.0:
            bucket.put("key", b"x")

    assert watch_by_polling(bucket, "key", tag=None, timeout=1.0, clock=clock, sleep=change_late) is not None
