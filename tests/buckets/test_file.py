"""A folder as a bucket: what it adds to the conformance suite, on the disk and when the disk refuses."""

import errno
import os
import threading
import time
from pathlib import Path

import pytest

from deltawire.buckets import Bucket, open_bucket
from deltawire.buckets.conformance import BucketTests
from deltawire.buckets.local import LocalBucket
from deltawire.errors import AccessRefused, AlreadyExists, BucketError, FormatError, NotFound, OutOfSpace, Unavailable


class TestFileBucket(BucketTests):
    @pytest.fixture
    def bucket(self, tmp_path: Path) -> Bucket:
        return open_bucket((tmp_path / "a bucket").as_uri(), create=True)

    @pytest.fixture
    def another(self, tmp_path: Path) -> Bucket:
        return open_bucket((tmp_path / "a bucket").as_uri())


def test_the_first_write_makes_the_folder_if_its_parent_exists(tmp_path: Path) -> None:
    bucket = LocalBucket(tmp_path / "bucket")
    assert not bucket.root.exists()
    bucket.put("runs/a/run.json", b"{}")
    assert (tmp_path / "bucket/runs/a/run.json").read_bytes() == b"{}"


def test_a_write_does_not_invent_the_parent_of_the_bucket(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="mkdir -p"):
        LocalBucket(tmp_path / "not mounted" / "bucket").put("key", b"")
    assert list(tmp_path.iterdir()) == []


def test_create_makes_the_folder_and_its_parents(tmp_path: Path) -> None:
    url = (tmp_path / "some" / "where").as_uri()
    assert list(open_bucket(url, create=True).list()) == []
    assert list(open_bucket(url, create=True).list()) == []


def test_reading_where_no_folder_is_names_the_folder(tmp_path: Path) -> None:
    bucket = LocalBucket(tmp_path / "typo")
    for read in (lambda: bucket.stat("key"), lambda: bucket.get("key", limit=1), lambda: list(bucket.list())):
        with pytest.raises(NotFound, match=f"no folder {tmp_path / 'typo'}"):
            read()
    bucket.delete("key")
    assert bucket.watch("key", tag=None, timeout=0) is None


def test_the_file_and_the_names_above_it_are_flushed_before_put_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed, really = [], os.fsync

    def fsync(handle: int) -> None:
        flushed.append(os.stat(handle).st_ino)
        really(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    LocalBucket(tmp_path / "bucket").put("runs/a/key", b"x")
    must = [tmp_path, tmp_path / "bucket", tmp_path / "bucket/runs", tmp_path / "bucket/runs/a"]
    assert {path.stat().st_ino for path in must} <= set(flushed)
    content = (tmp_path / "bucket/runs/a/key").stat().st_ino
    assert flushed.index(content) < flushed.index((tmp_path / "bucket/runs/a").stat().st_ino)


def test_a_failed_write_leaves_the_old_object_and_no_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = LocalBucket(tmp_path)
    bucket.put("key", b"old")

    def refuse(handle: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(BucketError, match="key: Input/output error"):
        bucket.put("key", b"new")
    assert bucket.get("key", limit=3) == b"old"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["key"]


def test_unfinished_writes_are_neither_listed_nor_reachable_and_go_after_a_day(tmp_path: Path) -> None:
    bucket = LocalBucket(tmp_path)
    bucket.put("key", b"x")
    unfinished = tmp_path / ".deltawire-unfinished"
    (unfinished / "recent").touch()
    (unfinished / "ancient").touch()
    os.utime(unfinished / "ancient", (0, time.time() - 100_000))
    assert [stat.key for stat in bucket.list()] == ["key"]
    with pytest.raises(FormatError, match="unfinished"):
        bucket.get(".deltawire-unfinished/recent", limit=1)
    LocalBucket(tmp_path).put("key", b"y")
    assert [path.name for path in unfinished.iterdir()] == ["recent"]


def test_an_object_and_a_folder_cannot_share_a_name_and_the_error_says_so(tmp_path: Path) -> None:
    bucket = LocalBucket(tmp_path)
    bucket.put("a/b", b"")
    with pytest.raises(BucketError, match="folder of another"):
        bucket.put("a", b"")
    with pytest.raises(BucketError, match="folder of another"):
        bucket.put("a/b/c", b"")
    with pytest.raises(AlreadyExists):
        bucket.put_new("a", b"")
    bucket.delete("a", "a/b/c")
    assert [stat.key for stat in bucket.list()] == ["a/b"]


def test_files_whose_names_are_no_keys_are_not_listed(tmp_path: Path) -> None:
    bucket = LocalBucket(tmp_path)
    bucket.put("key", b"")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")).touch()
    (tmp_path / "back\\slash").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    assert [stat.key for stat in bucket.list()] == ["key"]


def test_writers_in_many_threads_leave_every_object_whole(tmp_path: Path) -> None:
    bucket = LocalBucket(tmp_path)

    def write(number: int) -> None:
        for turn in range(5):
            bucket.put(f"replicas/{number}/{turn}", bytes([number]) * 1000)

    writers = [threading.Thread(target=write, args=(number,), daemon=True) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [stat.size for stat in bucket.list("replicas/")] == [1000] * 20


@pytest.mark.parametrize(("number", "kind"), [(errno.EACCES, AccessRefused), (errno.ESTALE, Unavailable)])
def test_what_the_file_system_refuses_has_a_type_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[BucketError]
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(kind, match="key"):
        LocalBucket(tmp_path).put("key", b"")


def test_a_full_disk_is_out_of_space_and_the_old_object_stays(tiny_disk: Path) -> None:
    bucket = LocalBucket(tiny_disk)
    bucket.put("key", b"old")
    with pytest.raises(OutOfSpace, match=r"key.*free some space"):
        bucket.put("key", bytes(2 << 20))
    with pytest.raises(OutOfSpace):
        bucket.put_new("new", bytes(2 << 20))
    assert [(stat.key, stat.size) for stat in bucket.list()] == [("key", 3)]
    bucket.put("key", bytes(500_000))


def test_a_full_disk_under_a_download_is_out_of_space_and_the_old_file_stays(tiny_disk: Path) -> None:
    bucket = open_bucket("memory://larger-than-the-tiny-disk")
    bucket.put("key", bytes(2 << 20))
    (tiny_disk / "out").write_bytes(b"old")
    with pytest.raises(OutOfSpace, match=str(tiny_disk / "out")):
        bucket.get_file("key", tiny_disk / "out", limit=2 << 20)
    assert [(path.name, path.read_bytes()) for path in tiny_disk.iterdir()] == [("out", b"old")]


def test_a_file_system_that_became_read_only_refuses_access_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    bucket = LocalBucket(tmp_path)
    bucket.put("key", b"old")
    monkeypatch.setattr(Path, "unlink", refuse)  # Linux refuses it even where there is no such file
    monkeypatch.setattr("builtins.open", refuse)
    for write in (bucket.put, bucket.put_new):
        with pytest.raises(AccessRefused, match="key: Read-only"):
            write("key", b"new")


def test_names_that_are_no_keys_do_not_fail_a_listing(tmp_path: Path) -> None:
    bucket = LocalBucket(tmp_path / "bucket")
    bucket.put("runs/a", b"x")
    for name in (b"runs/\xff\xfe", b"runs/a\\b", b"runs/a\x01b", b"\xff"):
        (Path(os.fsdecode(os.fsencode(bucket.root) + b"/" + name))).write_bytes(b"junk")
    folder = Path(os.fsdecode(os.fsencode(bucket.root) + b"/runs/\xfe"))
    folder.mkdir()
    (folder / "inside").write_bytes(b"junk")
    unreadable = bucket.root / "runs/secret"
    unreadable.write_bytes(b"")
    unreadable.chmod(0)
    assert [stat.key for stat in bucket.list()] == ["runs/a", "runs/secret"]
    assert [stat.key for stat in bucket.list("runs/")] == ["runs/a", "runs/secret"]
