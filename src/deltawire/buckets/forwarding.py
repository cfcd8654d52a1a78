"""A bucket around another: every verb goes to the one inside. A wrapper overrides only what it changes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from deltawire.buckets.base import Bucket, Stat, fenced, watch_by_polling

T = TypeVar("T")


class Forwarding:
    """A `Bucket` that does what the one inside does, and says of itself what that one says."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self.url = bucket.url
        self.poll_seconds = bucket.poll_seconds

    def __repr__(self) -> str:
        return f"<bucket {self.url}, {type(self).__name__.lower()}>"

    @property
    def conditional_writes(self) -> bool:
        """That of the bucket inside, which may have to `prove` it."""
        return self._bucket.conditional_writes

    def prove(self, folder: str) -> bool:
        """See `deltawire.buckets.base.fenced`."""
        return self._call(lambda: fenced(self._bucket, folder), folder)

    def stat(self, key: str) -> Stat:
        return self._call(lambda: self._bucket.stat(key), key)

    def get(self, key: str, *, limit: int) -> bytes:
        return self._call(lambda: self._bucket.get(key, limit=limit), key)

    def get_file(self, key: str, path: Path, *, limit: int) -> None:
        self._call(lambda: self._bucket.get_file(key, path, limit=limit), key)

    def put(self, key: str, data: bytes | Path) -> None:
        self._call(lambda: self._bucket.put(key, data), key)

    def put_new(self, key: str, data: bytes | Path) -> None:
        self._call(lambda: self._bucket.put_new(key, data), key)

    def list(self, prefix: str = "", *, after: str = "") -> Iterator[Stat]:
        # Collected: a listing that breaks off halfway is asked for again from its start, so none of it may be out yet.
        return iter(self._call(lambda: [*self._bucket.list(prefix, after=after)], prefix))

    def delete(self, *keys: str) -> None:
        self._call(lambda: self._bucket.delete(*keys), keys[0] if keys else "")

    def watch(self, key: str, *, tag: str | None, timeout: float) -> Stat | None:
        return watch_by_polling(self, key, tag=tag, timeout=timeout)

    def _call(self, verb: Callable[[], T], key: str) -> T:
        """Every verb but `watch`, which asks by `stat`, goes through here; `key` is what it is about."""
        return verb()
