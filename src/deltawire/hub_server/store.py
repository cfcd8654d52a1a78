"""The server's state: one folder, locked by one process, with all content, all metadata and half-received uploads.

<root>/lock         held while a process serves this folder
<root>/hub.sqlite   metadata
<root>/secret       signs what opens private content; for its owner's eyes
<root>/xorbs/       one file a xorb, named by its hash
<root>/staging/     uploads in progress; emptied at start
"""

import fcntl
import os
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from deltawire.errors import AccessRefused, FormatError, OutOfSpace, Unavailable
from deltawire.hub_server.catalog import Catalog, Entry
from deltawire.hub_server.content import Content
from deltawire.hub_server.database import Database
from deltawire.hub_server.durable import flush, no_space_is_typed
from deltawire.hub_server.reconstruct import reconstruct_range


@dataclass(frozen=True, slots=True)
class Stats:
    """What the server was sent and what it holds. Sizes in bytes."""

    received_bytes: int
    """bodies of xorbs and shards, since the server started"""
    deduplicated_bytes: int
    """bytes of uploaded files that did not have to be sent, because they were stored, since the server started"""
    xorbs: int
    stored_bytes: int
    """of all xorbs on disk, compressed as the client sent them"""
    files: int
    """distinct contents, in a bucket or not"""
    buckets: int


class Store:
    """Everything under `root`. Thread-safe.

    Whatever a method reported as done survives kill -9 and a power cut; whatever it did not is invisible afterwards.
    Raises Unavailable if another process has the folder, UnknownVersion if a newer deltawire wrote it, AccessRefused
    if it is no folder that this process may write to, FormatError if its metadata is none.
    """

    def __init__(self, root: Path | str, *, clock: Callable[[], float] = time.time) -> None:
        self.root = Path(root).absolute()
        self._staging = self.root / "staging"
        with _folder_is_typed(self.root), no_space_is_typed(self.root):
            (self.root / "xorbs").mkdir(parents=True, exist_ok=True)
            self._lock_file = _lock(self.root / "lock")
            try:
                self._open(clock)
            except BaseException:
                os.close(self._lock_file)
                raise
        self._counters = threading.Lock()
        self._stats = Stats(0, 0, 0, 0, 0, 0)

    def _open(self, clock: Callable[[], float]) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)
        self._staging.mkdir()
        flush(self.root)
        self._database = Database(self.root / "hub.sqlite")
        try:
            self.content = Content(self.root / "xorbs", self._database, clock=clock)
            self.content.remove_strays()
            self.catalog = Catalog(self._database, clock=clock)
            self.secret = _secret(self.root / "secret")
        except BaseException:
            self._database.close()
            raise

    def new_staging_path(self) -> Path:
        """A name nobody else has, for an upload in progress."""
        return self._staging / secrets.token_hex(16)

    def read(self, entry: Entry) -> Iterator[bytes]:
        """The bytes of a file, in pieces. Raises Damaged where the disk changed them."""
        segments = self.content.segments(entry.xet_hash)
        return self.content.read(reconstruct_range(segments, 0, entry.size, self.content.xorb_table))

    def count(self, *, received: int = 0, deduplicated: int = 0) -> None:
        """Add to the byte counters."""
        with self._counters:
            self._stats = replace(
                self._stats,
                received_bytes=self._stats.received_bytes + received,
                deduplicated_bytes=self._stats.deduplicated_bytes + deduplicated,
            )

    def stats(self) -> Stats:
        """The counters now."""
        with self._database.read() as connection:
            xorbs, stored = connection.execute("SELECT count(*), coalesce(sum(stored_bytes), 0) FROM xorbs").fetchone()
            files = connection.execute("SELECT count(*) FROM files").fetchone()[0]
            buckets = connection.execute("SELECT count(*) FROM buckets").fetchone()[0]
        return replace(self._stats, xorbs=xorbs, stored_bytes=stored, files=files, buckets=buckets)

    def close(self) -> None:
        """Let another process have the folder."""
        self._database.close()
        os.close(self._lock_file)


@contextmanager
def _folder_is_typed(root: Path) -> Iterator[None]:
    """Say which folder it is that cannot be used, why, and which option names another."""
    other = "give it a folder that you may write to (--root)"
    try:
        yield
    except OSError as error:
        where = "" if error.filename in (None, str(root)) else f" ({error.filename})"
        raise AccessRefused(f"cannot keep buckets in {root}: {error.strerror}{where}; {other}") from error
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
            raise OutOfSpace(f"no space left for {root / 'hub.sqlite'}; free some and start again") from error
        raise AccessRefused(f"cannot keep buckets in {root}: {error} (hub.sqlite); {other}") from error
    except sqlite3.DatabaseError as error:
        raise FormatError(f"{root / 'hub.sqlite'} is not the metadata of a bucket server: {error}; {other}") from error


def _secret(path: Path) -> bytes:
    """What signs passes: kept, so that those given out outlive a restart."""
    try:
        if len(kept := path.read_bytes()) == 32:
            return kept
    except FileNotFoundError:
        pass
    made = secrets.token_bytes(32)
    with no_space_is_typed(path), open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(made)
    flush(path)
    return made


def _lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if not isinstance(error, BlockingIOError):
            raise
        raise Unavailable(
            f"another bucket server is using {path.parent}; stop it or choose another folder (--root)"
        ) from None
    return descriptor
