"""Object stores and memory as buckets (`s3://`, `gs://`, `az://`, `memory://`), all through obstore."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any, Literal

import obstore
from obstore import exceptions, store

from deltawire.buckets.atomic import replacing
from deltawire.buckets.base import (
    Listing,
    Stat,
    check_key,
    check_prefix,
    is_key,
    look_then_put,
    size_of,
    watch_by_polling,
)
from deltawire.buckets.refusals import from_obstore, what_was_said
from deltawire.buckets.unsafe_keys import listed_anyway
from deltawire.errors import AlreadyExists, BucketError, NotFound, NotOffered, TooLarge, Unavailable

ONE_REQUEST = 32 << 20
"""bytes up to which an object travels in one request; a larger one is sent in parts, of which few are in memory, and
fetched in pieces of this size: obstore gives up on a request that takes long, however much of it has arrived"""
PART_BYTES = 8 << 20
PARTS = 10_000
"""how many parts S3 takes"""
AT_ONCE = 4
"""parts on their way together"""


class ObjectBucket:
    """The objects of one obstore store.

    `put_new` is atomic where the store honours `If-None-Match`, which is proved before the first. A store that ignores
    the condition, or answers 501 to it, is written to by stat-then-put, and `conditional_writes` says so. An object of
    more than 32 MiB is sent in parts, which cannot be conditional, so it is stat-then-put on every store: give such
    keys their content's hash.
    """

    def __init__(
        self, url: str, objects: Any, *, poll_seconds: float, fenced: bool | None = None, through: str = ""
    ) -> None:
        self.url = url
        self.poll_seconds = poll_seconds
        self._objects = objects
        self._fenced = fenced
        self._scheme, self._through = url.partition("://")[0], through

    def __repr__(self) -> str:
        return f"<bucket {self.url}>"

    @property
    def conditional_writes(self) -> bool:
        """True until `prove` has shown that the store has none."""
        return self._fenced is not False

    def stat(self, key: str) -> Stat:
        check_key(key)
        with self._errors(key):
            return _stat(obstore.head(self._objects, key))

    def get(self, key: str, *, limit: int) -> bytes:
        check_key(key)
        with self._errors(key):
            found = self._open(key, limit)
        return b"".join(bytes(chunk) for chunk in self._chunks(found, key))

    def get_file(self, key: str, path: Path, *, limit: int) -> None:
        check_key(key)
        with self._errors(key):
            found = self._open(key, limit)
        with replacing(path) as temporary, open(temporary, "xb") as file:
            for chunk in self._chunks(found, key):
                file.write(chunk)

    def put(self, key: str, data: bytes | Path) -> None:
        check_key(key)
        try:
            self._send(key, data, "overwrite")
        except AlreadyExists:  # nothing was asked to be new: obstore says so of every 409
            raise self._conflict(key) from None

    def put_new(self, key: str, data: bytes | Path) -> None:
        check_key(key)
        large, fenced = size_of(data) > ONE_REQUEST, self.prove(key.rpartition("/")[0])
        if fenced and not large:
            self._create(key, data)
            return
        look_then_put(self, key, data)

    def prove(self, folder: str) -> bool:
        """Whether `put_new` is atomic here. The store is asked once: an object below `folder` is written twice, which
        must fail the second time, and removed. Raises BucketError."""
        if self._fenced is None:
            key = f"{folder}/probe-{token_hex(8)}".lstrip("/")
            try:
                for _ in range(2):
                    self._create(key, b"probe")
                self._fenced = False
            except AlreadyExists:
                self._fenced = True
            except NotOffered:
                self._fenced = False
            with suppress(BucketError):  # credentials that may not delete leave a few bytes
                self.delete(key)
        return self._fenced

    def list(self, prefix: str = "", *, after: str = "") -> Iterator[Stat]:
        check_prefix(prefix)
        # obstore's prefix is whole path segments ("runs/a" does not find "runs/a1"): ask for the folder, then sift.
        folder = prefix.rpartition("/")[0] or None
        with self._errors(prefix):
            try:
                batches = obstore.list(self._objects, folder, offset=after or None)
                metas = (meta for batch in batches for meta in batch)
                found = [_stat(meta) for meta in Listing(f"{self.url}/{prefix}").count(metas)]
            except exceptions.InvalidPathError as error:
                found = [*Listing(f"{self.url}/{prefix}").count(listed_anyway(self.url, folder, after, error))]
        mine = (stat for stat in found if stat.key.startswith(prefix) and stat.key > after and is_key(stat.key))
        return iter(sorted(mine, key=lambda stat: stat.key))

    def delete(self, *keys: str) -> None:
        for key in keys:
            check_key(key)
        if keys:
            with self._errors(keys[0]):
                obstore.delete(self._objects, list(keys))

    def watch(self, key: str, *, tag: str | None, timeout: float) -> Stat | None:
        return watch_by_polling(self, key, tag=tag, timeout=timeout)

    def _create(self, key: str, data: bytes | Path) -> None:
        """One conditional write. Raises AlreadyExists only when the key is there: S3's 409 means "try again"."""
        try:
            self._send(key, data, "create")
        except AlreadyExists:
            try:
                self.stat(key)
            except NotFound:
                raise self._conflict(key) from None
            raise

    def _conflict(self, key: str) -> Unavailable:
        return Unavailable(f"{self.url}/{key}: a conflicting write is in progress (HTTP 409); try again")

    def _send(self, key: str, data: bytes | Path, mode: Literal["create", "overwrite"]) -> None:
        size = size_of(data)
        options: dict[str, Any] = {"mode": mode, "use_multipart": False}
        if size > ONE_REQUEST:
            # Parts of one size, but for the last, as R2 wants them.
            part = max(PART_BYTES, -(-size // PARTS))
            options = {"use_multipart": True, "chunk_size": part, "max_concurrency": AT_ONCE}
        if isinstance(data, Path):
            with open(data, "rb") as file, self._errors(key):
                obstore.put(self._objects, key, file, **options)
        else:
            with self._errors(key):
                obstore.put(self._objects, key, data, **options)

    def _open(self, key: str, limit: int) -> Any:
        found = obstore.get(self._objects, key)
        size = found.meta["size"]
        if size > limit:
            raise TooLarge(f"{self.url}/{key} is {size:,} bytes, more than the {limit:,} allowed here")
        return found

    def _chunks(self, found: Any, key: str) -> Iterator[Any]:
        """What arrives, in order; the store's errors are named here so that they are not taken for the disk's."""
        size, tag = found.meta["size"], found.meta["e_tag"]
        with self._errors(key):
            if size <= ONE_REQUEST:
                yield from found.stream()
                return
            for start in range(0, size, ONE_REQUEST):
                piece: Any = {"range": (start, min(start + ONE_REQUEST, size)), "if_match": tag}
                yield from obstore.get(self._objects, key, options=piece).stream()

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        where = f"{self.url}/{key}"
        try:
            yield
        except FileNotFoundError as error:
            if what_was_said(str(error)).status:
                raise from_obstore(where, error, scheme=self._scheme, through=self._through) from error
            raise NotFound(f"{where}: no such object (or no such bucket)") from error
        except exceptions.AlreadyExistsError as error:
            raise AlreadyExists(f"{where} exists already") from error
        except (exceptions.BaseError, ValueError, OSError, NotImplementedError) as error:
            raise from_obstore(where, error, scheme=self._scheme, through=self._through) from error


def open_memory(name: str) -> ObjectBucket:
    """The memory bucket of that name: the same objects for every caller in this process."""
    objects = _memories.setdefault(name, store.MemoryStore())
    return ObjectBucket(f"memory://{name}", objects, poll_seconds=0.5, fenced=True)


_memories: dict[str, Any] = {}


def _stat(meta: Any) -> Stat:
    tag = meta["e_tag"] or meta["version"] or meta["last_modified"].isoformat()
    return Stat(meta["path"], meta["size"], tag, meta["last_modified"].timestamp())
