"""What every bucket must do, as tests to inherit: a new store's test file names its bucket and is done.

```python
class TestMyBucket(BucketTests):
    @pytest.fixture
    def bucket(self, tmp_path):
        return MyBucket(tmp_path)
```
Needs pytest. Every test starts from an empty bucket.
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from deltawire.buckets.base import Bucket, Stat
from deltawire.buckets.conformance_writers import WriterTests
from deltawire.errors import BucketError, FormatError, NotFound, TooLarge

_UNSAFE_KEYS = [
    "",
    "/a",
    "a/",
    "a//b",
    ".",
    "..",
    "../a",
    "a/../b",
    "a/./b",
    "a\\b",
    "a\nb",
    "a\x00b",
    "a\x7fb",
    "\ud800",
    "x" * 256,
    "x/" * 512 + "x",
]
_ODD_KEYS = ["späße/日本.json", "with space", "a+b=c&d", "per%20cent", "hash#1", "what?", "tilde~", "(1)", "🙂"]


class BucketTests(WriterTests):
    """The verbs of `deltawire.buckets.Bucket`, one promise a test. Subclasses give the fixture `bucket`."""

    @pytest.fixture
    def bucket(self) -> Bucket:
        raise NotImplementedError("a subclass of BucketTests gives the fixture `bucket`: an empty bucket")

    @pytest.fixture
    def another(self, bucket: Bucket) -> Bucket:
        """The same store opened a second time, as by another process. A subclass gives it where that is possible."""
        return bucket

    # Reading and writing

    def test_what_was_put_is_what_one_gets(self, bucket: Bucket) -> None:
        bucket.put("runs/a1/run.json", b"{}")
        assert bucket.get("runs/a1/run.json", limit=2) == b"{}"

    def test_an_empty_object_is_an_object(self, bucket: Bucket, tmp_path: Path) -> None:
        bucket.put("empty", b"")
        bucket.get_file("empty", tmp_path / "out", limit=0)
        assert bucket.get("empty", limit=0) == (tmp_path / "out").read_bytes() == b""
        assert bucket.stat("empty").size == 0

    def test_megabytes_come_back_bit_for_bit(self, bucket: Bucket, tmp_path: Path) -> None:
        data = os.urandom(3 << 20) + b"end"
        bucket.put("deltas/big", data)
        bucket.get_file("deltas/big", tmp_path / "out", limit=len(data))
        assert bucket.get("deltas/big", limit=len(data)) == data
        assert (tmp_path / "out").read_bytes() == data

    @pytest.mark.parametrize("verb", ["put", "put_new"])
    def test_a_path_is_a_source(self, bucket: Bucket, tmp_path: Path, verb: str) -> None:
        source = tmp_path / "source"
        source.write_bytes(os.urandom(1 << 20))
        getattr(bucket, verb)("from-a-path", source)
        assert bucket.get("from-a-path", limit=1 << 20) == source.read_bytes()

    @pytest.mark.parametrize("verb", ["put", "put_new"])
    def test_a_source_that_cannot_be_read_is_the_callers_own_error(
        self, bucket: Bucket, tmp_path: Path, verb: str
    ) -> None:
        with pytest.raises(FileNotFoundError):
            getattr(bucket, verb)("key", tmp_path / "nothing-here")
        with pytest.raises(NotFound):
            bucket.stat("key")

    def test_put_overwrites(self, bucket: Bucket) -> None:
        bucket.put("HEAD.json", b"version 1, the longer one")
        bucket.put("HEAD.json", b"version 2")
        assert bucket.get("HEAD.json", limit=9) == b"version 2"
        assert bucket.stat("HEAD.json").size == 9

    @pytest.mark.parametrize("key", _ODD_KEYS)
    def test_a_key_may_be_any_unicode_a_url_would_have_to_escape(self, bucket: Bucket, key: str) -> None:
        bucket.put(key, key.encode())
        assert bucket.get(key, limit=100) == key.encode()
        assert [stat.key for stat in bucket.list()] == [key]
        bucket.delete(key)
        assert list(bucket.list()) == []

    @pytest.mark.parametrize("key", _UNSAFE_KEYS)
    def test_an_unsafe_key_is_refused_by_every_verb(self, bucket: Bucket, key: str, tmp_path: Path) -> None:
        verbs: list[Callable[[], object]] = [
            lambda: bucket.stat(key),
            lambda: bucket.get(key, limit=1),
            lambda: bucket.get_file(key, tmp_path / "out", limit=1),
            lambda: bucket.put(key, b""),
            lambda: bucket.put_new(key, b""),
            lambda: bucket.delete("fine", key),
            lambda: bucket.watch(key, tag=None, timeout=0),
        ]
        for verb in verbs:
            with pytest.raises(FormatError):
                verb()
        assert list(bucket.list()) == []

    # Limits and failures

    def test_get_refuses_more_than_its_limit(self, bucket: Bucket) -> None:
        bucket.put("four", b"1234")
        assert bucket.get("four", limit=4) == b"1234"
        with pytest.raises(TooLarge, match="four"):
            bucket.get("four", limit=3)

    def test_a_missing_object_is_not_found_and_named(self, bucket: Bucket, tmp_path: Path) -> None:
        bucket.put("there", b"")
        for verb in (
            lambda: bucket.stat("not/there"),
            lambda: bucket.get("not/there", limit=1),
            lambda: bucket.get_file("not/there", tmp_path / "out", limit=1),
        ):
            with pytest.raises(NotFound, match="not/there"):
                verb()

    def test_a_folder_is_not_an_object(self, bucket: Bucket) -> None:
        bucket.put("folder/key", b"")
        with pytest.raises(NotFound):
            bucket.stat("folder")

    def test_get_file_leaves_the_old_file_and_no_other_when_it_fails(self, bucket: Bucket, tmp_path: Path) -> None:
        bucket.put("large", b"123456")
        out = tmp_path / "out"
        out.write_bytes(b"old")
        with pytest.raises(TooLarge):
            bucket.get_file("large", out, limit=5)
        with pytest.raises(NotFound):
            bucket.get_file("missing", out, limit=5)
        assert out.read_bytes() == b"old"
        assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["out"]

    def test_get_file_into_a_folder_that_is_not_there_names_it_and_makes_none(
        self, bucket: Bucket, tmp_path: Path
    ) -> None:
        bucket.put("key", b"x")
        with pytest.raises(BucketError, match="nowhere"):
            bucket.get_file("key", tmp_path / "nowhere" / "out", limit=1)
        assert not (tmp_path / "nowhere").exists()

    def test_get_file_replaces_the_old_file(self, bucket: Bucket, tmp_path: Path) -> None:
        bucket.put("new", b"new")
        out = tmp_path / "out"
        out.write_bytes(b"older and longer")
        bucket.get_file("new", out, limit=3)
        assert out.read_bytes() == b"new"

    # Listing and deleting

    @pytest.mark.parametrize("after", ["", "b", "b/1", "b/1x", "z"])
    def test_a_listing_may_begin_after_a_key(self, bucket: Bucket, after: str) -> None:
        keys = ["a", "b/1", "b/2", "b-2", "c"]
        for key in keys:
            bucket.put(key, b"")
        assert [stat.key for stat in bucket.list(after=after)] == sorted(key for key in keys if key > after)
        below = sorted(key for key in keys if key > after and key.startswith("b/"))
        assert [stat.key for stat in bucket.list("b/", after=after)] == below

    def test_list_is_in_key_order_with_sizes_and_tags(self, bucket: Bucket) -> None:
        for size, key in enumerate(["b", "a/2", "a/10", "a-b", "B", "a/1/x"]):
            bucket.put(key, bytes(size))
        found = list(bucket.list())
        assert [stat.key for stat in found] == ["B", "a-b", "a/1/x", "a/10", "a/2", "b"]
        assert found == [bucket.stat(stat.key) for stat in found]
        assert [stat.size for stat in found] == [4, 3, 5, 2, 1, 0]

    @pytest.mark.parametrize(
        ("prefix", "keys"),
        [
            ("", ["run", "runs/a/1", "runs/a/2", "runs/ab/1", "runs/b"]),
            ("run", ["run", "runs/a/1", "runs/a/2", "runs/ab/1", "runs/b"]),
            ("runs/", ["runs/a/1", "runs/a/2", "runs/ab/1", "runs/b"]),
            ("runs/a", ["runs/a/1", "runs/a/2", "runs/ab/1"]),
            ("runs/a/", ["runs/a/1", "runs/a/2"]),
            ("runs/a/2", ["runs/a/2"]),
            ("runs/c", []),
            ("none/at/all", []),
        ],
    )
    def test_a_prefix_is_the_start_of_the_key_as_a_string(self, bucket: Bucket, prefix: str, keys: list[str]) -> None:
        for key in ["runs/b", "runs/a/2", "runs/ab/1", "runs/a/1", "run"]:
            bucket.put(key, b"")
        assert [stat.key for stat in bucket.list(prefix)] == keys

    @pytest.mark.parametrize("prefix", ["/", "../", "a/../", "a//", "\\"])
    def test_a_prefix_no_safe_key_can_have_is_refused(self, bucket: Bucket, prefix: str) -> None:
        with pytest.raises(FormatError):
            list(bucket.list(prefix))

    def test_delete_removes_many_and_does_not_mind_what_is_gone(self, bucket: Bucket) -> None:
        for key in ["a/1", "a/2", "b"]:
            bucket.put(key, b"x")
        bucket.delete("a/1", "b", "never/was")
        assert [stat.key for stat in bucket.list()] == ["a/2"]
        bucket.delete("a/1", "b")
        bucket.delete()
        assert [stat.key for stat in bucket.list()] == ["a/2"]

    def test_a_deleted_key_can_be_new_again(self, bucket: Bucket) -> None:
        bucket.put_new("key", b"old")
        bucket.delete("key")
        with pytest.raises(NotFound):
            bucket.get("key", limit=3)
        bucket.put_new("key", b"new")
        assert bucket.get("key", limit=3) == b"new"

    # Tags and watching

    def test_the_tag_changes_with_the_content_even_at_the_same_size(self, bucket: Bucket) -> None:
        tags = []
        for content in (b"aaaa", b"bbbb", b"cccc", b"dddd"):
            bucket.put("HEAD.json", content)
            tags.append(bucket.stat("HEAD.json").tag)
        assert len(set(tags)) == 4
        assert bucket.stat("HEAD.json").tag == tags[-1]

    def test_watch_returns_at_once_what_differs_from_the_tag(self, bucket: Bucket) -> None:
        bucket.put("HEAD.json", b"1")
        seen = bucket.stat("HEAD.json")
        assert bucket.watch("HEAD.json", tag=None, timeout=60) == seen
        assert bucket.watch("HEAD.json", tag="another", timeout=60) == seen

    def test_watch_gives_up_when_time_is_out(self, bucket: Bucket) -> None:
        bucket.put("HEAD.json", b"1")
        assert bucket.watch("HEAD.json", tag=bucket.stat("HEAD.json").tag, timeout=0) is None
        assert bucket.watch("never/was", tag=None, timeout=0.01) is None

    @pytest.mark.parametrize("before", [None, b"1"])
    def test_watch_sees_a_key_appear_and_change(self, bucket: Bucket, before: bytes | None) -> None:
        tag = None
        if before is not None:
            bucket.put("HEAD.json", before)
            tag = bucket.stat("HEAD.json").tag
        seen: list[Stat | None] = []
        watcher = threading.Thread(target=lambda: seen.append(bucket.watch("HEAD.json", tag=tag, timeout=60)))
        watcher.start()
        bucket.put("HEAD.json", b"2")
        watcher.join()
        assert seen == [bucket.stat("HEAD.json")]

    # What it says of itself

    def test_it_says_where_it_is_and_how_often_to_ask(self, bucket: Bucket) -> None:
        assert isinstance(bucket, Bucket)
        assert "://" in bucket.url
        assert bucket.url in repr(bucket)
        assert bucket.poll_seconds > 0
