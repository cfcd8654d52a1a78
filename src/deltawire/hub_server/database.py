"""Where all metadata lives: one SQLite file, in which a transaction survives a power cut if and only if it returned."""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deltawire.errors import OutOfSpace, UnknownVersion

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE xorbs (hash BLOB PRIMARY KEY, stored_bytes INTEGER NOT NULL, chunks BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE files (hash BLOB PRIMARY KEY, size INTEGER NOT NULL, segments BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE shards (id INTEGER PRIMARY KEY, xorbs BLOB NOT NULL);
CREATE TABLE chunks (hash BLOB PRIMARY KEY, shard INTEGER NOT NULL REFERENCES shards (id)) WITHOUT ROWID;
CREATE TABLE buckets (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    private INTEGER NOT NULL,
    created_ms INTEGER NOT NULL
);
CREATE TABLE entries (
    bucket INTEGER NOT NULL REFERENCES buckets (id) ON DELETE CASCADE,
    path TEXT NOT NULL,
    xet_hash BLOB NOT NULL,
    size INTEGER NOT NULL,
    mtime_ms INTEGER NOT NULL,
    uploaded_ms INTEGER NOT NULL,
    content_type TEXT,
    PRIMARY KEY (bucket, path)
) WITHOUT ROWID;
"""


_SINCE_USERS = """
CREATE TABLE IF NOT EXISTS holders (hash BLOB NOT NULL, user TEXT NOT NULL, PRIMARY KEY (hash, user)) WITHOUT ROWID
"""
"""who has sent which xorb and which file, and so may use it again"""


class Database:
    """One connection to write, one to read, each for one thread at a time: readers never wait for a flush."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._write_lock = threading.Lock()
        self._read_lock = threading.Lock()
        self._writer = _connect(path)
        self._connections = [self._writer]
        try:
            self._reader = _connect(path)
            self._connections.append(self._reader)
            self._create_tables()
        except BaseException:
            self.close()
            raise

    def _create_tables(self) -> None:
        with self.write() as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                for statement in _SCHEMA.split(";"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
            elif version != _SCHEMA_VERSION:
                raise UnknownVersion(f"{self._path} has layout {version}; this deltawire reads {_SCHEMA_VERSION}")
            connection.execute(_SINCE_USERS)

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A transaction: on the disk when the block ends, undone if it raises. Raises OutOfSpace."""
        with self._write_lock:
            try:
                self._writer.execute("BEGIN IMMEDIATE")
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException as error:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error) and error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                    raise OutOfSpace(f"no space left for {self._path}; free some and try again") from error
                raise

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A consistent view of what was committed when the block began."""
        with self._read_lock:
            self._reader.execute("BEGIN")
            try:
                yield self._reader
            finally:
                self._reader.execute("COMMIT")

    def close(self) -> None:
        """Close both connections. Committed transactions need no closing to be safe."""
        for connection in self._connections:
            connection.close()


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
    except BaseException:
        connection.close()
        raise
    return connection
