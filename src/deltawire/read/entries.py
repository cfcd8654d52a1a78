"""An entry of a host's cache, on disk: its lock, its size, and the wait for another process that fills it."""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

LOCK, CONTENT = "lock", "content"
"""names in an entry's folder"""


class Wait:
    """Waits for the one that fills an entry from the bucket `source`, as long as that gets on."""

    def __init__(self, entry: Path, source: str, patience: float) -> None:
        self._entry, self._source, self._patience = entry, source, patience
        self._size, self._since, self._began = -1, 0.0, time.monotonic()

    def goes_on(self) -> bool:
        """Sleep for a moment; False once nothing was added for too long, or if it is filled from elsewhere."""
        with suppress(OSError, UnicodeDecodeError):
            if (self._entry / LOCK).read_text() not in ("", self._source):
                return False
        now, size = time.monotonic(), size_of(self._entry)
        if size != self._size:
            self._size, self._since = size, now
        if now - self._since > self._patience:
            return False
        time.sleep(min(0.25, max(0.005, (now - self._began) / 20)))
        return True


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry on disk: its bytes, when it was last held, in seconds since the epoch, and whether all of it is
    there."""

    path: Path
    size: int
    used: float
    whole: bool


def entries(folder: Path) -> Iterator[Entry]:
    for path in folder.iterdir():
        with suppress(FileNotFoundError, NotADirectoryError):  # removed meanwhile, or a file of somebody else's
            yield Entry(path, size_of(path), (path / LOCK).stat().st_mtime, (path / CONTENT).is_dir())


def size_of(folder: Path) -> int:
    """Bytes of the files below an entry's folder, but for its lock."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            if place == str(folder) and name == LOCK:
                continue
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(place, name), follow_symlinks=False).st_size
    return total


def locked(entry: Path, *, alone: bool, make: bool = True) -> int | None:
    """The entry's lock, as a file to be closed; None while others hold it, or when the entry was removed meanwhile."""
    try:
        if make:
            entry.mkdir(mode=0o700, exist_ok=True)
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if make else 0)
        lock = os.open(entry / LOCK, flags, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), os.stat(entry / LOCK)):
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None


def is_shared(lock: int) -> bool:
    """Whether a lock could be made a shared one. For an instant in between, nobody holds it."""
    with suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return True
    return False


def delete(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
