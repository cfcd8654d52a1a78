"""A bucket that lets someone in before and after each of its verbs: to fail, to crash, to let others go first."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from deltawire.buckets.base import Bucket, Stat, watch_by_polling
from deltawire.buckets.forwarding import Forwarding

T = TypeVar("T")
Visit = Callable[[str, str, str], None]
"""(moment, verb, key), the moment being "before" or "after"; what it raises, the caller of the verb gets"""


class Crash(BaseException):
    """The process that runs ends here. Nothing of it goes on but what the store and its disk hold."""


class Observed(Forwarding):
    """`bucket`, whose every verb is announced to `visit` before and after."""

    def __init__(self, bucket: Bucket, visit: Visit) -> None:
        super().__init__(bucket)
        self._visit = visit

    def stat(self, key: str) -> Stat:
        return self._ask("stat", key, lambda: self._bucket.stat(key))

    def get(self, key: str, *, limit: int) -> bytes:
        return self._ask("get", key, lambda: self._bucket.get(key, limit=limit))

    def get_file(self, key: str, path: Path, *, limit: int) -> None:
        self._ask("get_file", key, lambda: self._bucket.get_file(key, path, limit=limit))

    def put(self, key: str, data: bytes | Path) -> None:
        self._ask("put", key, lambda: self._bucket.put(key, data))

    def put_new(self, key: str, data: bytes | Path) -> None:
        self._ask("put_new", key, lambda: self._bucket.put_new(key, data))

    def list(self, prefix: str = "", *, after: str = "") -> Iterator[Stat]:
        return iter(self._ask("list", prefix, lambda: [*self._bucket.list(prefix, after=after)]))

    def delete(self, *keys: str) -> None:
        """One visit a key: a store that dies in the middle has deleted the first of them."""
        for key in keys:
            self._ask("delete", key, lambda key=key: self._bucket.delete(key))  # type: ignore[misc]

    def watch(self, key: str, *, tag: str | None, timeout: float) -> Stat | None:
        return watch_by_polling(self, key, tag=tag, timeout=timeout)

    def _ask(self, verb: str, key: str, ask: Callable[[], T]) -> T:
        self._visit("before", verb, key)
        found = ask()
        self._visit("after", verb, key)
        return found
