"""The store interface: eight verbs over keys. The rest of deltawire is written against this and nothing below it."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

from deltawire.errors import AlreadyExists, FormatError, NotFound, TooLarge

T = TypeVar("T")
MAX_LISTED = 1_000_000
"""objects of one listing: what a run of 250,000 versions leaves; about 400 MB of memory"""


@dataclass(frozen=True, slots=True)
class Stat:
    """What a store says of an object without sending its bytes."""

    key: str
    size: int
    """bytes"""
    tag: str
    """changes whenever the content does (ETag, Xet hash)"""
    modified: float = 0.0
    """when it was written, in seconds since the epoch by the store's own clock"""


@runtime_checkable
class Bucket(Protocol):
    """A flat map from keys to immutable byte strings.

    Keys are relative POSIX paths ("runs/a1/commits/000001.json"); no leading or trailing "/", no empty, "." or ".."
    part, no backslash, no control character. `check_key` is the rule; every implementation applies it. No key may be a
    folder of another ("a" beside "a/b"): a local folder cannot hold both.

    A verb that fails raises a `BucketError` naming the bucket's url and the key: `Unavailable` for what may pass by
    itself (no answer, HTTP 408, 409, 425, 429, 5xx but 501 and 507), another kind for what someone has to see to. An
    unsafe key is a FormatError, a source `Path` that cannot be read the OSError of reading it. Thread-safe.
    """

    url: str
    """What `open_bucket` was given, without credentials: safe to print."""
    poll_seconds: float
    """How often it is polite to `stat` this store: 0.5 local, 2 in a cloud (requests are billed), 5 on the Hub (free
    tier: 1,000 calls per 5 minutes)."""

    @property
    def conditional_writes(self) -> bool:
        """Whether `put_new` is atomic against a concurrent writer. Where False it is stat-then-put. A store that can
        only find out by writing says True until then, and has a verb `prove(folder)`; see `fenced`."""
        ...

    def stat(self, key: str) -> Stat:
        """The object's size and tag. Raises NotFound."""
        ...

    def get(self, key: str, *, limit: int) -> bytes:
        """The whole object. Raises NotFound; TooLarge if it is longer than `limit` bytes, before reading it all."""
        ...

    def get_file(self, key: str, path: Path, *, limit: int) -> None:
        """Write the whole object to `path`, by a temporary name beside it and a rename. So `path` is never half
        written, and a failure leaves it as it was. Raises NotFound, TooLarge, OutOfSpace."""
        ...

    def put(self, key: str, data: bytes | Path) -> None:
        """Write or overwrite. Readers see the old bytes or the new ones, never a mix. Durable when it returns."""
        ...

    def put_new(self, key: str, data: bytes | Path) -> None:
        """Write a key that must not exist yet. Raises AlreadyExists and changes nothing if it does.

        AlreadyExists is a promise that the key is there: a store's "conflict, try again" (S3's 409) is Unavailable."""
        ...

    def list(self, prefix: str = "", *, after: str = "") -> Iterator[Stat]:
        """Every object whose key starts with `prefix` (a plain string prefix) and is greater than `after`, in key order
        (by code point). Where the store can begin there, what comes before is not asked for. What no key can be is left
        out, and does not fail the rest. Raises TooLarge beyond MAX_LISTED objects."""
        ...

    def delete(self, *keys: str) -> None:
        """Remove objects. A key that is already gone is not an error."""
        ...

    def watch(self, key: str, *, tag: str | None, timeout: float) -> Stat | None:
        """Wait until `key` exists with a tag other than `tag`, at most `timeout` seconds. None when time ran out."""
        ...


def fenced(bucket: Bucket, folder: str) -> bool:
    """Whether `put_new` is atomic in a bucket, proved by an object below `folder` if need be. Raises BucketError."""
    prove: Callable[[str], bool] | None = getattr(bucket, "prove", None)
    return bucket.conditional_writes if prove is None else prove(folder)


def size_of(data: bytes | Path) -> int:
    """Bytes of what `put` is given."""
    return data.stat().st_size if isinstance(data, Path) else len(data)


def bytes_of(data: bytes | Path) -> bytes:
    """What `put` is given, in memory."""
    return data.read_bytes() if isinstance(data, Path) else data


def check_key(key: str) -> None:
    """Raise FormatError unless `key` is safe and portable: it may come from a file that a stranger wrote.

    At most 1,024 bytes of UTF-8 (the limit of S3), 255 a part (that of file systems).
    """
    try:
        parts = [part.encode() for part in key.split("/")]
    except UnicodeEncodeError:
        raise FormatError(f"unsafe key {key!r}: it is not valid Unicode") from None
    if any(part in (b"", b".", b"..") for part in parts):
        raise FormatError(f"unsafe key {key!r}: it has an empty, '.' or '..' part")
    if "\\" in key or any(ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0 for char in key):
        raise FormatError(f"unsafe key {key!r}: it has a backslash or a control character")
    if sum(map(len, parts)) + len(parts) - 1 > 1024 or max(map(len, parts)) > 255:
        raise FormatError(f"unsafe key {key[:64]!r}…: longer than 1,024 bytes, or than 255 between two slashes")


def is_key(key: str) -> bool:
    """Whether `check_key` accepts it. Listings leave out what no verb could fetch."""
    try:
        check_key(key)
    except FormatError:
        return False
    return True


def check_prefix(prefix: str) -> None:
    """Raise FormatError unless some safe key could start with `prefix`."""
    if prefix:
        check_key(prefix.removesuffix("/"))


class Listing:
    """Counts what a store lists, so that one without an end is not held in memory."""

    def __init__(self, where: str) -> None:
        self._where, self._seen = where, 0

    def count(self, found: Iterable[T]) -> Iterator[T]:
        """The objects, as they come. Raises TooLarge beyond MAX_LISTED in all."""
        for item in found:
            self._seen += 1
            if self._seen > MAX_LISTED:
                raise TooLarge(
                    f"{self._where} holds more than {MAX_LISTED:,} objects: prune, or remove what is foreign"
                )
            yield item


def look_then_put(bucket: Bucket, key: str, data: bytes | Path) -> None:
    """`Bucket.put_new` for what the store cannot refuse: another writer may come between the look and the write."""
    try:
        bucket.stat(key)
    except NotFound:
        bucket.put(key, data)
    else:
        raise AlreadyExists(f"{bucket.url}/{key} exists already")


def watch_by_polling(
    bucket: Bucket,
    key: str,
    *,
    tag: str | None,
    timeout: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
) -> Stat | None:
    """`Bucket.watch` for a store that only answers questions: `stat` now, every `poll_seconds`, and at the end.

    `sleep` may return early (an event's `wait` does, so a caller can be woken): the object is looked at again.
    """
    deadline = clock() + timeout
    while True:
        try:
            found = bucket.stat(key)
        except NotFound:
            found = None
        if found is not None and found.tag != tag:
            return found
        left = deadline - clock()
        if left <= 0:
            return None
        sleep(min(left, bucket.poll_seconds))
