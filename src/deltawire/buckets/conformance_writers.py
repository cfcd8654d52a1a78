"""What every bucket must do when several write to it: new keys and overwrites, as tests to inherit."""

import os
import threading
from pathlib import Path

import pytest

from deltawire.buckets.base import Bucket
from deltawire.errors import AlreadyExists


class WriterTests:
    """Promises of `put_new` and `put`, kept against other writers and readers. `BucketTests` includes them."""

    large = 0
    """bytes above which the store takes an object apart (lower it for the tests); 0 for a store that never does"""

    # put_new

    def test_put_new_writes_once_and_then_changes_nothing(self, bucket: Bucket) -> None:
        bucket.put_new("commits/1", b"first")
        with pytest.raises(AlreadyExists, match="commits/1"):
            bucket.put_new("commits/1", b"second")
        assert bucket.get("commits/1", limit=5) == b"first"

    def test_of_many_writers_of_a_new_key_exactly_one_wins(self, bucket: Bucket) -> None:
        bucket.put_new("commits/0", b"")  # some stores find out by writing
        if not bucket.conditional_writes:
            pytest.skip(f"{bucket.url} has no conditional writes, and says so")
        start, won, lost = threading.Barrier(8), [], []

        def write(number: int) -> None:
            start.wait()
            try:
                bucket.put_new("commits/1", bytes([number]) * 10_000)
                won.append(number)
            except AlreadyExists:
                bucket.stat("commits/1")  # AlreadyExists promises that it is there: "conflict, retry" is Unavailable
                lost.append(number)

        writers = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert (len(won), len(lost)) == (1, 7)
        assert bucket.get("commits/1", limit=10_000) == bytes(won) * 10_000

    def test_what_one_client_wrote_another_does_not_write_over(self, bucket: Bucket, another: Bucket) -> None:
        for number in range(3):  # the first write of a client may be the one by which it learns what the store can
            bucket.put_new(f"commits/{number}", b"first")
            with pytest.raises(AlreadyExists):
                another.put_new(f"commits/{number}", b"second")
            another.put_new(f"commits/other-{number}", b"first")
            with pytest.raises(AlreadyExists):
                bucket.put_new(f"commits/other-{number}", b"second")
        assert {bucket.get(stat.key, limit=6) for stat in bucket.list()} == {b"first"}
        assert bucket.conditional_writes == another.conditional_writes

    @pytest.mark.parametrize("verb", ["put", "put_new"])
    def test_a_large_object_comes_back_whole_and_is_no_more_overwritten_than_a_small_one(
        self, bucket: Bucket, tmp_path: Path, verb: str
    ) -> None:
        if not self.large:
            pytest.skip(f"{bucket.url} sends every object in one piece")
        data = os.urandom(2 * self.large + 1)
        (tmp_path / "large").write_bytes(data)
        for key, source in (("path", tmp_path / "large"), ("bytes", data)):
            getattr(bucket, verb)(key, source)
            assert bucket.stat(key).size == len(data)
            bucket.get_file(key, tmp_path / "out", limit=len(data))
            assert (tmp_path / "out").read_bytes() == data
            with pytest.raises(AlreadyExists):
                bucket.put_new(key, tmp_path / "large")
            bucket.put(key, b"small")
            with pytest.raises(AlreadyExists):
                bucket.put_new(key, tmp_path / "large")
            assert bucket.get(key, limit=5) == b"small"

    def test_a_reader_during_an_overwrite_sees_the_old_bytes_or_the_new(self, bucket: Bucket) -> None:
        contents = [bytes([number]) * 50_000 for number in range(2)]
        bucket.put("HEAD.json", contents[0])
        done = threading.Event()

        def overwrite() -> None:
            try:
                for number in range(10):
                    bucket.put("HEAD.json", contents[number % 2])
            finally:  # a failing writer ends its reader too
                done.set()

        writer = threading.Thread(target=overwrite)
        writer.start()
        seen = {bucket.get("HEAD.json", limit=50_000)}
        while not done.is_set():
            seen.add(bucket.get("HEAD.json", limit=50_000))
        writer.join()
        assert seen <= set(contents)
