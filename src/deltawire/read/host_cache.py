"""One copy a host of what its readers fetch: found by the hash of its content, fetched by one of them, read by all.

Workers, ranks and followers of one user share a folder. Each entry is a folder in it, named by what it holds:

    NAME/lock       locked alone by the one that fills the entry, shared by those that read it
    NAME/filling/   what is being fetched; a file gets its name here once its hash was compared
    NAME/content/   the same folder, renamed when all is there

Why this is safe:

- A process that is killed leaves no lock, because the kernel drops flocks with their process. The next one finds
  `filling`, keeps its whole files and fetches the rest. A part of a file has another name, and is removed.
- Nothing in here is believed. Every reader hashes what it did not just fetch itself, as it would what a store sent.
  What is wrong is removed and fetched again.
- Files are put in place whole, and never written into. So one that a reader has mapped stays as it was hashed, also
  once it is removed.
- An entry is removed only by one that holds its lock alone, so never while it is read or filled.
- Nothing in here is needed. Where the disk is full, the folder is not ours alone, or the one that fills an entry
  stands still, a reader fetches for itself.
"""

import logging
import os
import shutil
import stat
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Self

from deltawire.buckets.atomic import require_room
from deltawire.buckets.base import Bucket
from deltawire.buckets.verified import download_verified, get_verified, map_verified
from deltawire.errors import BucketError, FormatError, NotFound, OutOfSpace
from deltawire.read.entries import CONTENT, LOCK, Wait, delete, entries, is_shared, locked, size_of

FOLDER, LIMIT = "DELTAWIRE_CACHE", "DELTAWIRE_CACHE_GIB"
"""variables of the environment"""
GIB = 1 << 30
USUAL_LIMIT = 4 * GIB
"""bytes of a cache, unless that is more than a tenth of its disk"""
PATIENCE = 60.0
"""seconds without a byte more after which one that fills an entry is not waited for"""
GRACE = 600.0
"""seconds that a download which was broken off is kept, to go on with, where it is larger than the limit"""
_FILLING, _DATA = "filling", "data"


def cache_folder() -> Path:
    """Where this user's things that can be made again are kept, by the XDG base directories. Raises NotFound for a user
    without a home."""
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "deltawire"
    try:
        return Path.home() / ".cache" / "deltawire"
    except RuntimeError:  # as of a container whose user is a number alone
        raise NotFound("this user has no home folder: set HOME, or XDG_CACHE_HOME to a folder for caches") from None


def host_cache(environ: Mapping[str, str] = os.environ) -> "HostCache | None":
    """The cache that the processes of this user on this host share: in the folder that DELTAWIRE_CACHE names, by
    default `cache_folder()`, and None where that says `off`, or where there is no home. DELTAWIRE_CACHE_GIB is its
    limit.

    Raises FormatError for a limit that is not a number.
    """
    chosen = environ.get(FOLDER, "")
    if chosen == "off":
        return None
    size = environ.get(LIMIT, "")
    try:
        limit = int(float(size) * GIB) if size else None
    except (ValueError, OverflowError):
        raise FormatError(f"{LIMIT} is {size!r}: give a number of GiB, as 4 or 0.5") from None
    try:
        return HostCache(Path(chosen).absolute() if chosen else cache_folder(), limit)
    except NotFound:
        return None


class HostCache:
    """The cache below a folder. `limit` is in bytes; None means `USUAL_LIMIT`, or a tenth of a smaller disk.

    Before something is fetched, what was used longest ago goes, until the new entry fits. An entry that is larger than
    the limit, as an anchor may be, stays while somebody holds it.
    """

    def __init__(self, folder: Path, limit: int | None = None, *, patience: float = PATIENCE) -> None:
        self.folder = folder / f"payloads-{os.geteuid()}"
        self._limit, self._patience = limit, patience

    @property
    def limit(self) -> int:
        """Bytes that stay without being held."""
        if self._limit is None:
            self._limit = min(USUAL_LIMIT, shutil.disk_usage(self.folder).total // 10)
        return self._limit

    def get_verified(self, bucket: Bucket, key: str, *, size: int, blake3: str) -> bytes | memoryview:
        """As `deltawire.buckets.verified.get_verified`, fetched once a host, and in memory once: mapped from its file,
        which may be removed meanwhile. Raises the same."""

        def fill(folder: Path) -> None:
            download_verified(bucket, key, folder / _DATA, size=size, blake3=blake3)

        for _ in range(2):  # what is damaged is fetched again, by us or by another
            held = self.hold(blake3, size, fill, source=bucket.url)
            if held is None:
                break
            with held, suppress(OSError, FormatError):
                return map_verified(held.path / _DATA, size=size, blake3=blake3)
            held.discard()
        return get_verified(bucket, key, size=size, blake3=blake3)

    def hold(self, name: str, size: int, fill: Callable[[Path], None], *, source: str) -> "Held | None":
        """The entry of that name, which stays until it is let go. `fill` puts about `size` bytes of the bucket `source`
        into a folder, in which an earlier call may have left whole files. Only one process of the host does it at a
        time.

        None where the cache is of no use now: its disk is full or refuses, or who fills the entry stands still, or
        reads another bucket, which may be slower. Raises what `fill` raises, but for OutOfSpace and what the file
        system says of the cache's own files.
        """
        try:
            self._require_own()
            return self._hold(self.folder / name, size, fill, source)
        except OutOfSpace:
            return None
        except BucketError as error:
            if not self._is_of_ours(error.__cause__):
                raise
            return None
        except OSError as error:
            if error.errno is None:  # a watchdog's TimeoutError, and no file's fault
                raise
            return None

    def _is_of_ours(self, error: BaseException | None) -> bool:
        """Whether the file system said something of a file in here, and not the store of what it holds."""
        named = error.filename if isinstance(error, OSError) else None
        return isinstance(named, str | Path) and Path(named).is_relative_to(self.folder)

    def _require_own(self) -> None:
        """Raise PermissionError unless the folder is this user's alone; it is made if need be."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = self.folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            _say_once(f"{self.folder} is not this user's alone, so each process fetches for itself: chmod 700 it")
            raise PermissionError(1, f"{self.folder} is not this user's alone")

    def _hold(self, entry: Path, size: int, fill: Callable[[Path], None], source: str) -> "Held | None":
        wait = Wait(entry, source, self._patience)
        while True:
            whole = (entry / CONTENT).is_dir()
            lock = locked(entry, alone=not whole)
            if lock is None:
                if not wait.goes_on():
                    return None
                continue
            try:
                if not whole and not (entry / CONTENT).is_dir():  # one that was removed just now is not locked alone
                    (entry / LOCK).write_text(source)
                    self._fill(entry, size, fill)
                if is_shared(lock) and (entry / CONTENT).is_dir():
                    os.utime(entry / LOCK)
                    return Held(self, entry, lock)
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)

    def _fill(self, entry: Path, size: int, fill: Callable[[Path], None]) -> None:
        self._make_room(size)
        require_room(entry, size)
        aside = entry / _FILLING
        aside.mkdir(mode=0o700, exist_ok=True)
        for left in aside.glob(".*"):  # parts of files, of one that was killed
            delete(left)
        fill(aside)
        aside.rename(entry / CONTENT)

    def _make_room(self, size: int) -> None:
        """Remove what nobody holds until so many bytes more fit, the least recently used first."""
        found = sorted(entries(self.folder), key=lambda entry: entry.used)
        small = [entry for entry in found if entry.size <= self.limit]
        for entry in found:
            if entry.size > self.limit and (entry.whole or entry.used < time.time() - GRACE):
                self.remove(entry.path)
        kept = sum(entry.size for entry in small)
        wanted = size if size <= self.limit else 0
        for entry in small:
            fits = kept + wanted <= self.limit and size <= shutil.disk_usage(self.folder).free
            if not fits and self.remove(entry.path):
                kept -= entry.size

    def remove(self, entry: Path) -> bool:
        """Remove an entry, unless somebody reads or fills it. Whether it is gone."""
        lock = locked(entry, alone=True, make=False)
        if lock is None:
            return False
        try:
            gone = entry / ".gone"
            delete(gone)
            with suppress(FileNotFoundError):
                (entry / CONTENT).rename(gone)  # at once, for one that looks without the lock
            for left in (gone, entry / _FILLING, entry / LOCK):  # from here on another may begin again
                delete(left)
            with suppress(OSError):
                entry.rmdir()
        finally:
            os.close(lock)
        return True


class Held:
    """An entry that nobody removes until it is let go, at the latest with this process. `path` is what fills it."""

    def __init__(self, cache: HostCache, entry: Path, lock: int) -> None:
        self._cache, self._entry, self._lock = cache, entry, lock
        self.path = entry / CONTENT

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of it. The last one to let go of what is larger than the limit removes it."""
        if self._lock < 0:
            return
        os.close(self._lock)
        self._lock = -1
        with suppress(OSError):
            if size_of(self._entry) > self._cache.limit:
                self._cache.remove(self._entry)

    def discard(self) -> None:
        """Let go of it, and remove it unless somebody else holds it: what it holds is damaged."""
        self.close()
        with suppress(OSError):
            self._cache.remove(self._entry)


@cache
def _say_once(text: str) -> None:
    logging.getLogger("deltawire").warning(text)
