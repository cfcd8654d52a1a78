"""A folder as a bucket (`file://`): every write is atomic, and on the disk when it returns.

Not obstore's LocalStore: it renames without fsync (strace of 0.12.1), so a commit it acknowledged can be lost with the
power; its tags come from the kernel's coarse clock; it refuses keys such as "h#1".
"""

import builtins
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from deltawire.buckets.atomic import file_system_errors, replacing
from deltawire.buckets.base import Listing, Stat, check_key, check_prefix, is_key, watch_by_polling
from deltawire.errors import AlreadyExists, FormatError, NotFound, TooLarge

_UNFINISHED = ".deltawire-unfinished"
_ABANDONED_AFTER = 24 * 3600.0
_NO_SUCH_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class LocalBucket:
    """The objects under one folder. The folder itself is made by the first write, if its parent exists.

    Safe for concurrent writers on one host, in threads or processes.
    """

    poll_seconds = 0.5
    conditional_writes = True

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.url = self.root.as_uri()
        self._swept = False

    def __repr__(self) -> str:
        return f"<bucket {self.url}>"

    def create(self) -> None:
        """Make the folder, and those above it, unless it is there."""
        with file_system_errors(self.url):
            self.root.mkdir(parents=True, exist_ok=True)

    def stat(self, key: str) -> Stat:
        with self._open(key) as file:
            return _stat(key, os.fstat(file.fileno()))

    def get(self, key: str, *, limit: int) -> bytes:
        with self._open(key) as file, file_system_errors(self._name(key)):
            return file.read(self._size_within(limit, file, key))

    def get_file(self, key: str, path: Path, *, limit: int) -> None:
        with self._open(key) as file:
            size = self._size_within(limit, file, key)
            with replacing(path) as temporary, open(temporary, "xb") as out:
                _copy_most(file, out, size)

    def put(self, key: str, data: bytes | Path) -> None:
        self._write(key, data, os.replace)

    def put_new(self, key: str, data: bytes | Path) -> None:
        def name_once(aside: Path, target: Path) -> None:
            # A link, unlike a rename, fails if the name is taken; and like it, shows the whole file or none.
            try:
                os.link(aside, target)
            except FileExistsError:
                raise AlreadyExists(f"{self._name(key)} exists already") from None

        self._write(key, data, name_once)

    def list(self, prefix: str = "", *, after: str = "") -> Iterator[Stat]:
        check_prefix(prefix)
        if not self.root.is_dir():
            raise self._missing(prefix)
        found, room = [], Listing(self._name(prefix))
        with file_system_errors(self._name(prefix)):
            folders = os.walk(self.root / prefix.rpartition("/")[0], onerror=_raise_unless_gone)
            for folder, _, names in room.count(folders):
                inside = "".join(f"{part}/" for part in Path(folder).relative_to(self.root).parts)
                for name in room.count(names):
                    key = f"{inside}{name}"
                    wanted = key.startswith(prefix) and key > after and is_key(key) and not _is_reserved(key)
                    if wanted and os.path.isfile(os.path.join(folder, name)):
                        found.append(key)
        return self._stats(sorted(found))

    def delete(self, *keys: str) -> None:
        for key in keys:
            self._check(key)
        folders = set()
        for key in keys:
            with file_system_errors(self._name(key)):
                try:
                    (self.root / key).unlink()
                except _NO_SUCH_FILE:
                    continue
                folders.add((self.root / key).parent)
        for folder in folders:
            with file_system_errors(self.url):
                _sync_folder(folder)

    def watch(self, key: str, *, tag: str | None, timeout: float) -> Stat | None:
        return watch_by_polling(self, key, tag=tag, timeout=timeout)

    def _write(self, key: str, data: bytes | Path, publish: Callable[[Path, Path], None]) -> None:
        """Write aside, flush to the disk, then let `publish` give the file its name."""
        self._check(key)
        target = self.root / key
        aside = self.root / _UNFINISHED / f"{time.time_ns():x}-{secrets.token_hex(6)}"
        source = open(data, "rb") if isinstance(data, Path) else BytesIO(data)  # noqa: SIM115
        with source, file_system_errors(self._name(key)):
            try:
                self._make_folder(aside.parent)
                self._sweep(aside.parent)
                _copy_durably(source, aside)
                self._make_folder(target.parent)
                publish(aside, target)
                _sync_folder(target.parent)
            finally:
                aside.unlink(missing_ok=True)  # on a read-only file system even this is refused

    def _make_folder(self, folder: Path) -> None:
        """Make `folder` and what is missing above it, up to the root, each durable in its parent."""
        missing = []
        while not folder.is_dir():
            if folder == self.root.parent:
                raise NotFound(f"{self.url}: no folder {folder} to make the bucket in; run `mkdir -p {folder}`")
            missing.append(folder)
            folder = folder.parent
        for new in reversed(missing):
            new.mkdir(exist_ok=True)
            _sync_folder(new.parent)

    def _sweep(self, folder: Path) -> None:
        """Remove what writers that were killed left behind: once per bucket object, and only what is a day old."""
        if self._swept:
            return
        self._swept = True
        for path in folder.iterdir():
            try:
                if path.stat().st_mtime < time.time() - _ABANDONED_AFTER:
                    path.unlink()
            except FileNotFoundError:  # its writer finished meanwhile
                continue

    def _open(self, key: str) -> BinaryIO:
        self._check(key)
        with file_system_errors(self._name(key)):
            try:
                file = open(self.root / key, "rb", opener=_without_waiting)  # noqa: SIM115
            except (*_NO_SUCH_FILE, _NotRegular):
                raise self._missing(key) from None
        return file

    def _missing(self, key: str) -> NotFound:
        if not self.root.is_dir():
            return NotFound(f"{self.url}: no folder {self.root}; nothing was written to this bucket yet")
        return NotFound(f"{self._name(key)}: no such object")

    def _size_within(self, limit: int, file: BinaryIO, key: str) -> int:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise TooLarge(f"{self._name(key)} is {size:,} bytes, more than the {limit:,} allowed here")
        return size

    def _stats(self, keys: builtins.list[str]) -> Iterator[Stat]:
        for key in keys:
            with file_system_errors(self._name(key)):
                try:
                    found = os.stat(self.root / key)
                except _NO_SUCH_FILE:  # deleted since the folder was read
                    continue
            yield _stat(key, found)

    def _check(self, key: str) -> None:
        check_key(key)
        if _is_reserved(key):
            raise FormatError(f"unsafe key {key!r}: {_UNFINISHED}/ is where {self.url} keeps unfinished writes")

    def _name(self, key: str) -> str:
        return f"{self.url}/{key}"


class _NotRegular(OSError):
    """What lies under a key is a pipe, a device or a folder: reading one may wait for ever, or never end."""


def _without_waiting(path: str, flags: int) -> int:
    """Open a regular file, or what a link says is one. Opening a pipe would wait for its writer."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise _NotRegular(path)


def _copy_most(source: BinaryIO, out: BinaryIO, size: int) -> None:
    """Copy as many bytes as there were when it was opened: it may grow meanwhile."""
    while size and (piece := source.read(min(size, 1 << 20))):
        out.write(piece)
        size -= len(piece)


def _is_reserved(key: str) -> bool:
    return key.split("/", 1)[0] == _UNFINISHED


def _copy_durably(source: BinaryIO, target: Path) -> None:
    with open(target, "xb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
        file.flush()
        # The kernel stamps files with a clock of about 4 ms, and inode numbers are reused: two writes of one size could
        # share a tag, and a watcher would miss the second.
        now = time.time_ns()
        os.utime(file.fileno(), ns=(now, now))
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: fsync of a file does not cover the entry that names it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _stat(key: str, found: os.stat_result) -> Stat:
    tag = f"{found.st_ino:x}-{found.st_mtime_ns:x}-{found.st_size:x}"
    return Stat(key, found.st_size, tag, found.st_mtime)


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, _NO_SUCH_FILE):
        raise error
