"""Which buckets there are and what each path in them is: names, hashes, sizes and times, no content."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from sqlite3 import Connection

from deltawire.errors import AlreadyExists, NotFound
from deltawire.hub_server.batch import DeleteFile, Failure, PutFile
from deltawire.hub_server.content import file_size
from deltawire.hub_server.database import Database

_FIRST_AFTER_SLASH = chr(ord("/") + 1)


class BucketMissing(NotFound):
    """There is no bucket of that name."""


class EntryMissing(NotFound):
    """The bucket has no file at that path."""


@dataclass(frozen=True, slots=True)
class BucketInfo:
    """A bucket and the sum of what is in it."""

    name: str
    """namespace/name"""
    private: bool
    created_ms: int
    size: int
    """bytes, of all files as a reader sees them"""
    files: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A file in a bucket. Times are milliseconds since 1970."""

    path: str
    xet_hash: bytes
    size: int
    mtime_ms: int
    uploaded_ms: int
    content_type: str | None


@dataclass(frozen=True, slots=True)
class Folder:
    """A part of a path that files lie under, with the upload time of the first of them."""

    path: str
    uploaded_ms: int


@dataclass(frozen=True, slots=True)
class Page:
    """A piece of a listing, and where the next begins, if there is one."""

    items: tuple[Entry | Folder, ...]
    next_start: str | None


class Catalog:
    """The buckets of one server. Thread-safe; a change is durable when the method returns."""

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    def create(self, bucket: str, *, private: bool) -> None:
        """Make an empty bucket. Raises AlreadyExists."""
        with self._database.write() as connection:
            made = connection.execute(
                "INSERT OR IGNORE INTO buckets (name, private, created_ms) VALUES (?, ?, ?)",
                (bucket, private, self._now()),
            )
            if made.rowcount == 0:
                raise AlreadyExists(f"bucket {bucket} already exists")

    def delete(self, bucket: str) -> None:
        """Remove a bucket and its paths. Raises BucketMissing."""
        with self._database.write() as connection:
            connection.execute("DELETE FROM buckets WHERE id = ?", (_bucket_id(connection, bucket),))

    def rename(self, bucket: str, name: str) -> None:
        """Give a bucket with all that is in it another name. Raises BucketMissing, AlreadyExists."""
        with self._database.write() as connection:
            row = (name, _bucket_id(connection, bucket))
            if connection.execute("UPDATE OR IGNORE buckets SET name = ? WHERE id = ?", row).rowcount == 0:
                raise AlreadyExists(f"bucket {name} already exists")

    def set_private(self, bucket: str, *, private: bool) -> None:
        """Say whether only its owner may see a bucket. Raises BucketMissing."""
        with self._database.write() as connection:
            row = (private, _bucket_id(connection, bucket))
            connection.execute("UPDATE buckets SET private = ? WHERE id = ?", row)

    def is_private(self, bucket: str) -> bool:
        """Whether only its owner may see a bucket. Raises BucketMissing."""
        with self._database.read() as connection:
            number = _bucket_id(connection, bucket)
            return bool(connection.execute("SELECT private FROM buckets WHERE id = ?", (number,)).fetchone()[0])

    def lists(self, bucket: str, xet_hash: bytes) -> bool:
        """Whether a path of a bucket has this content. Raises BucketMissing."""
        with self._database.read() as connection:
            query = "SELECT 1 FROM entries WHERE bucket = ? AND xet_hash = ? LIMIT 1"
            return connection.execute(query, (_bucket_id(connection, bucket), xet_hash)).fetchone() is not None

    def info(self, bucket: str) -> BucketInfo:
        """A bucket and its totals. Raises BucketMissing."""
        with self._database.read() as connection:
            _bucket_id(connection, bucket)
            return next(_infos(connection, "buckets.name = ?", (bucket,), limit=1))

    def names(self) -> list[str]:
        """Every bucket, by name."""
        with self._database.read() as connection:
            return [name for (name,) in connection.execute("SELECT name FROM buckets ORDER BY name")]

    def buckets(self, namespace: str, *, private: bool, search: str, after: str, limit: int) -> list[BucketInfo]:
        """Up to `limit` buckets of a namespace whose name contains `search`, by name, those after `after`.

        Private ones are left out unless asked for.
        """
        with self._database.read() as connection:
            where = "substr(name, 1, ?) = ? AND instr(name, ?) > 0 AND private <= ? AND name > ?"
            prefix = f"{namespace}/"
            return list(_infos(connection, where, (len(prefix), prefix, search, private, after), limit=limit))

    def apply(self, bucket: str, operations: Sequence[PutFile | DeleteFile | Failure]) -> list[Failure]:
        """Do what can be done, in order and in one transaction; return what could not.

        Raises BucketMissing, OutOfSpace.
        """
        with self._database.write() as connection:
            number = _bucket_id(connection, bucket)
            outcomes = [self._apply_one(connection, number, operation) for operation in operations]
        return [outcome for outcome in outcomes if outcome is not None]

    def _apply_one(
        self, connection: Connection, bucket: int, operation: PutFile | DeleteFile | Failure
    ) -> Failure | None:
        if isinstance(operation, Failure):
            return operation
        if isinstance(operation, DeleteFile):
            where = (bucket, operation.path)
            gone = connection.execute("DELETE FROM entries WHERE bucket = ? AND path = ?", where)
            return None if gone.rowcount else Failure(operation.path, "not found")
        size = file_size(connection, operation.xet_hash)
        if size is None:
            return Failure(operation.path, "no file with this xetHash was uploaded")
        row = (
            *(bucket, operation.path, operation.xet_hash, size),
            *(operation.mtime_ms, self._now(), operation.content_type),
        )
        connection.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        return None

    def entries(self, bucket: str, paths: Sequence[str]) -> list[Entry]:
        """The files at these paths, in this order; paths without a file are left out. Raises BucketMissing."""
        with self._database.read() as connection:
            number = _bucket_id(connection, bucket)
            found = (_entry(connection, number, path) for path in paths)
            return [entry for entry in found if entry is not None]

    def entry(self, bucket: str, path: str) -> Entry:
        """The file at a path. Raises BucketMissing, EntryMissing."""
        for entry in self.entries(bucket, [path]):
            return entry
        raise EntryMissing(f"bucket {bucket} has no file {path}")

    def list(self, bucket: str, prefix: str, *, recursive: bool, start: str, limit: int) -> Page:
        """Up to `limit` items whose path starts with `prefix` (letters, not folders), from `start` on, by path.

        Not recursive: only the first level, below the folder `prefix` names or whose parts it begins; deeper files
        appear as Folders. Raises BucketMissing.
        """
        with self._database.read() as connection:
            number = _bucket_id(connection, bucket)
            walk = _walk_files if recursive else _walk_level
            items = list(islice(walk(connection, number, prefix, max(start, prefix)), limit + 1))
        if len(items) <= limit:
            return Page(tuple(items), None)
        return Page(tuple(items[:limit]), _just_after(items[limit - 1]))

    def _now(self) -> int:
        return int(self._clock() * 1000)


_COLUMNS = "path, xet_hash, size, mtime_ms, uploaded_ms, content_type"


def _bucket_id(connection: Connection, bucket: str) -> int:
    found = connection.execute("SELECT id FROM buckets WHERE name = ?", (bucket,)).fetchone()
    if found is None:
        raise BucketMissing(f"there is no bucket {bucket}; create it first")
    return int(found[0])


def _infos(connection: Connection, where: str, values: tuple[object, ...], *, limit: int) -> Iterator[BucketInfo]:
    query = f"""
        SELECT buckets.name, private, created_ms, coalesce(sum(size), 0), count(path)
        FROM buckets LEFT JOIN entries ON entries.bucket = buckets.id
        WHERE {where} GROUP BY buckets.name ORDER BY buckets.name LIMIT ?"""
    for name, private, created, size, files in connection.execute(query, (*values, limit)):
        yield BucketInfo(name, bool(private), created, size, files)


def _entry(connection: Connection, bucket: int, path: str) -> Entry | None:
    query = f"SELECT {_COLUMNS} FROM entries WHERE bucket = ? AND path = ?"
    found = connection.execute(query, (bucket, path)).fetchone()
    return None if found is None else Entry(*found)


def _walk_files(connection: Connection, bucket: int, prefix: str, start: str) -> Iterator[Entry]:
    query = f"SELECT {_COLUMNS} FROM entries WHERE bucket = ? AND path >= ? ORDER BY path"
    for row in connection.execute(query, (bucket, start)):
        entry = Entry(*row)
        if not entry.path.startswith(prefix):
            return
        yield entry


def _walk_level(connection: Connection, bucket: int, prefix: str, start: str) -> Iterator[Entry | Folder]:
    """Jump from one folder to the next instead of reading what is in it."""
    below = f"{prefix.rstrip('/')}/" if prefix else ""
    beside = prefix[: prefix.rfind("/") + 1]
    while (entry := next(_walk_files(connection, bucket, prefix, start), None)) is not None:
        base = below if entry.path.startswith(below) else beside
        name, slash, _ = entry.path[len(base) :].partition("/")
        item = Folder(base + name, entry.uploaded_ms) if slash else entry
        yield item
        start = _just_after(item)


def _just_after(item: Entry | Folder) -> str:
    """The lowest path that can follow an item: no path has a NUL, so nothing lies between "a" and "a\\1"."""
    return item.path + (_FIRST_AFTER_SLASH if isinstance(item, Folder) else "\x01")
