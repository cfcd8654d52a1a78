"""Buckets around a bucket: under a prefix, retrying, typed, counting. Each is a `Bucket` itself, so they nest."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import tenacity

from deltawire.buckets.base import Bucket, Stat, check_key, check_prefix, fenced, size_of
from deltawire.buckets.forwarding import Forwarding
from deltawire.buckets.refusals import from_anything
from deltawire.errors import DeltaWireError, Unavailable

T = TypeVar("T")


class Prefix(Forwarding):
    """The part of `bucket` whose keys start with `prefix` and a "/", under the rest of those keys."""

    def __init__(self, bucket: Bucket, prefix: str) -> None:
        check_key(prefix)
        super().__init__(bucket)
        self._prefix = prefix + "/"
        self.url = f"{bucket.url}/{prefix}"

    def prove(self, folder: str) -> bool:
        return super().prove(self._prefix + folder)

    def __repr__(self) -> str:
        return f"<bucket {self.url}>"

    def stat(self, key: str) -> Stat:
        return self._without(self._bucket.stat(self._with(key)))

    def get(self, key: str, *, limit: int) -> bytes:
        return self._bucket.get(self._with(key), limit=limit)

    def get_file(self, key: str, path: Path, *, limit: int) -> None:
        self._bucket.get_file(self._with(key), path, limit=limit)

    def put(self, key: str, data: bytes | Path) -> None:
        self._bucket.put(self._with(key), data)

    def put_new(self, key: str, data: bytes | Path) -> None:
        self._bucket.put_new(self._with(key), data)

    def list(self, prefix: str = "", *, after: str = "") -> Iterator[Stat]:
        check_prefix(prefix)
        return map(self._without, self._bucket.list(self._prefix + prefix, after=after and self._prefix + after))

    def delete(self, *keys: str) -> None:
        self._bucket.delete(*map(self._with, keys))

    def watch(self, key: str, *, tag: str | None, timeout: float) -> Stat | None:
        found = self._bucket.watch(self._with(key), tag=tag, timeout=timeout)
        return None if found is None else self._without(found)

    def _with(self, key: str) -> str:
        check_key(key)  # before joining: the whole would hide an empty key
        return self._prefix + key

    def _without(self, stat: Stat) -> Stat:
        return replace(stat, key=stat.key.removeprefix(self._prefix))


class Retry(Forwarding):
    """`bucket`, asked again while it is Unavailable, `attempts` times in all; any other error is final at once.

    Waits are random, up to `first_wait` seconds at first, then doubling up to `longest_wait`; the last error is raised
    as it came.

    A `put_new` whose acknowledgement was lost finds its own object on the second attempt and raises AlreadyExists: only
    the caller can tell its bytes from another writer's, by reading them.
    """

    def __init__(
        self,
        bucket: Bucket,
        *,
        attempts: int = 5,
        first_wait: float = 0.2,
        longest_wait: float = 10.0,
        sleep: Callable[[float], None] = tenacity.nap.sleep,
    ) -> None:
        super().__init__(bucket)
        self._policy = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Unavailable),
            stop=tenacity.stop_after_attempt(attempts),
            wait=tenacity.wait_random_exponential(multiplier=first_wait, max=longest_wait),
            sleep=sleep,
            reraise=True,
        )

    def _call(self, verb: Callable[[], T], key: str) -> T:
        return self._policy.copy()(verb)


class Typed(Forwarding):
    """`bucket`, whose every failure is a DeltaWireError, for stores written elsewhere and sources that cannot be read.
    Any other error becomes Unavailable, or BucketError where another try cannot help."""

    def _call(self, verb: Callable[[], T], key: str) -> T:
        try:
            return verb()
        except DeltaWireError:
            raise
        except Exception as error:
            raise from_anything(f"{self.url}/{key}", error) from error


@dataclass(frozen=True, slots=True)
class Traffic:
    """What went through a `Counting` bucket so far: calls of any verb, failed ones too, and payload bytes."""

    calls: int = 0
    bytes_up: int = 0
    bytes_down: int = 0


class Counting(Forwarding):
    """`bucket`, with `traffic` saying how much has gone through it. Bytes count once they have arrived whole."""

    def __init__(self, bucket: Bucket) -> None:
        super().__init__(bucket)
        self._lock = threading.Lock()
        self.traffic = Traffic()

    def get(self, key: str, *, limit: int) -> bytes:
        data = super().get(key, limit=limit)
        self._count(down=len(data))
        return data

    def get_file(self, key: str, path: Path, *, limit: int) -> None:
        super().get_file(key, path, limit=limit)
        self._count(down=path.stat().st_size)

    def put(self, key: str, data: bytes | Path) -> None:
        super().put(key, data)
        self._count(up=size_of(data))

    def put_new(self, key: str, data: bytes | Path) -> None:
        super().put_new(key, data)
        self._count(up=size_of(data))

    def prove(self, folder: str) -> bool:
        return fenced(self._bucket, folder)

    def _call(self, verb: Callable[[], T], key: str) -> T:
        self._count(calls=1)
        return verb()

    def _count(self, *, calls: int = 0, up: int = 0, down: int = 0) -> None:
        with self._lock:
            was = self.traffic
            self.traffic = Traffic(was.calls + calls, was.bytes_up + up, was.bytes_down + down)
