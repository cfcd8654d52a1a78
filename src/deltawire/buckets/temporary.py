"""A folder of temporary files that outlives no process for long: what a killed one left, the next removes.

<TMPDIR>/deltawire-abcdefgh/.in-use@HOST@BOOT     locked (flock) by the process that made the folder, until that ends

Several hosts may share TMPDIR, and a network file system may keep locks to one host. So only a host's own folders are
removed there.
"""

import fcntl
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from deltawire.buckets.atomic import file_system_errors

PREFIX = "deltawire-"
_IN_USE = ".in-use"
_BOOT = Path("/proc/sys/kernel/random/boot_id")
"""the same in all containers of a host, of which each has a name of its own"""


class TemporaryFolder:
    """A folder of its own below TMPDIR, at `path`, removed by `close` or, after a kill, by the next process to make
    one. After a kill it stays where the file system has no locks, as Lustre may. Raises OutOfSpace, AccessRefused and
    their kinds.
    """

    def __init__(self) -> None:
        with file_system_errors("the folder of temporary files (TMPDIR chooses another)"):
            _sweep_once(tempfile.gettempdir())
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
            try:
                self._lock: int | None = _locked_in(self.path)
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
    """Remove the folders whose processes have ended; which they were. Those of other users and hosts stay."""
    removed = []
    for folder in _ours(parent):
        with suppress(OSError):  # it is in use, has just been made or removed
            if (mark := _mark_of_this_host(folder)) is not None:
                with open(mark, "r+b") as file:  # network file systems lock only what may be written
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
                    removed.append(folder)
    return removed


@cache
def _sweep_once(parent: str) -> None:
    with suppress(OSError):  # a folder can be made where none can be listed
        sweep(Path(parent))


def _ours(parent: Path) -> Iterator[Path]:
    for entry in os.scandir(parent):
        own = False
        with suppress(FileNotFoundError):  # another process removed it meanwhile
            own = entry.name.startswith(PREFIX) and entry.stat(follow_symlinks=False).st_uid == os.getuid()
        if own and entry.is_dir(follow_symlinks=False):
            yield Path(entry.path)


def _host() -> tuple[str, ...]:
    """What this host is known by: its name, and its boot, where the kernel names it."""
    name = platform.node().replace("/", "-")
    with suppress(OSError):
        return name, _BOOT.read_text().strip()
    return (name,)


def _mark_of_this_host(folder: Path) -> Path | None:
    """The file that a process of this host locks, or did; None in a folder of another host, or of another make."""
    here = set(_host())
    marks = (mark for mark in folder.glob(f"{_IN_USE}@*") if here & {*mark.name.split("@")[1:]})
    return next(marks, None)


def _locked_in(folder: Path) -> int:
    """The descriptor of an open and locked file, which gets its name only once it is locked: a sweep must not find it
    in between. Where there are no locks it never does, and no sweep removes its folder."""
    aside = folder / ".new"
    file = os.open(aside, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
            aside.rename(folder / "@".join((_IN_USE, *_host())))
    except BaseException:
        os.close(file)
        raise
    return file
