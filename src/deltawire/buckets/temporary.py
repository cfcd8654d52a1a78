"""A folder of temporary files that outlives no process for long: what a killed one left, the next removes.

<TMPDIR>/deltawire-abcdefgh/.in-use        locked (flock) by the process that made the folder, until that ends
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from deltawire.buckets.atomic import file_system_errors

PREFIX = "deltawire-"
_IN_USE = ".in-use"


class TemporaryFolder:
    """A folder of its own below TMPDIR, at `path`, removed by `close` or, after a kill, by the next process to make
    one. Raises OutOfSpace, AccessRefused and their kinds.
    """

    def __init__(self) -> None:
        with file_system_errors("the folder of temporary files (TMPDIR chooses another)"):
            _sweep_once(tempfile.gettempdir())
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
            try:
                self._lock: int | None = _locked_at(self.path / _IN_USE)
            except BaseException:
                shutil.rmtree(self.path, ignore_errors=True)
                raise

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove it with all that it holds; again is nothing."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def sweep(parent: Path) -> list[Path]:
    """Remove the folders whose processes have ended; which they were. Those of other users stay."""
    removed = []
    for folder in _ours(parent):
        try:
            with open(folder / _IN_USE, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder)
        except OSError:  # it is in use, has just been made or removed, or is not of this class
            continue
    return removed


@cache
def _sweep_once(parent: str) -> None:
    sweep(Path(parent))


def _ours(parent: Path) -> Iterator[Path]:
    for entry in os.scandir(parent):
        own = False
        with suppress(FileNotFoundError):  # another process removed it meanwhile
            own = entry.name.startswith(PREFIX) and entry.stat(follow_symlinks=False).st_uid == os.getuid()
        if own and entry.is_dir(follow_symlinks=False):
            yield Path(entry.path)


def _locked_at(path: Path) -> int:
    """The descriptor of an open and locked file, which gets its name only once it is locked: a sweep must not find it
    in between."""
    aside = path.with_name(f"{path.name}.new")
    file = os.open(aside, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        aside.rename(path)
    except BaseException:
        os.close(file)
        raise
    return file
