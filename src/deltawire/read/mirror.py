"""A checkpoint folder kept current, version by version, through a redo journal: what a host holds beside any GPU.

    journal (absolute values) → flush → apply in place → flush → mark the new position → drop the journal

Killed at any instruction, the next opening finds the old position, or a whole journal, which is done again: it holds
values and not steps, so doing it twice is doing it once.
"""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from deltawire.buckets.atomic import file_system_errors, replacing
from deltawire.errors import AccessRefused, AlreadyExists, BadDigest, FormatError, NotFound
from deltawire.format import checkpoint, delta_file
from deltawire.format.checkpoint import Checkpoint
from deltawire.runlog.records import Position
from deltawire.weights.delta import Delta
from deltawire.weights.digest import root as root_of
from deltawire.weights.table import TensorEntry, aliases_of

MARKER = "deltawire.json"
"""the file in a folder that says which position its weights are"""
_JOURNAL = ".deltawire-journal-"
_WRITER, _READERS = ".deltawire-writer", ".deltawire-readers"


class Mirror:
    """The weights of one run in a folder in Hugging Face layout, memory-mapped, at `position`.

    One writer a folder, across processes. Readers of `reading` never see half an update; a program that merely opens
    the files may. Opening repairs what a killed writer left, then reads and checks every tensor.

    Raises NotFound for a folder that is no mirror, AccessRefused when another process writes it, BadDigest when its
    weights are not what it says.
    """

    def __init__(
        self, folder: Path, table: Iterable[TensorEntry], *, on_step: Callable[[str], None] = lambda step: None
    ) -> None:
        self.folder, self.table = folder, tuple(table)
        self._on_step = on_step
        if held(folder) is None:
            raise NotFound(f"{folder} is no mirror: it has no {MARKER}; remove it, and it is made again")
        self._lock = _locked(folder / _WRITER, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            self.weights = Checkpoint(folder, writable=True)
            self._repair()
            self.position = _require_held(folder)
            self.digests = self.weights.digests(self.table)
            if root_of(self.table, self.digests) != self.position.root:
                raise BadDigest(f"{folder} does not hold {self.position} any more: remove it, and it is made again")
        except BaseException:
            self._lock.close()
            raise

    @classmethod
    def create(
        cls,
        folder: Path,
        files: Iterable[Path],
        position: Position,
        table: Iterable[TensorEntry],
        *,
        on_step: Callable[[str], None] = lambda step: None,
    ) -> "Mirror":
        """A mirror of a checkpoint's files, which appears whole and on the disk or not at all; it holds no aliases.

        Raises AlreadyExists for a folder that holds anything, OutOfSpace; BadDigest when the files are not `position`.
        """
        entries = tuple(table)
        with building(folder, position) as work:
            checkpoint.copy(files, work, without=aliases_of(entries))
            weights = Checkpoint(work)
            digests = weights.digests(entries)
            if root_of(entries, digests) != position.root:
                raise BadDigest(f"these files are not {position}: their digests do not make its root")
        return cls(folder, entries, on_step=on_step)

    def __enter__(self) -> "Mirror":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another process write."""
        self._lock.close()

    @property
    def files(self) -> list[Path]:
        """The checkpoint's files."""
        return [path for path in checkpoint.files(self.folder) if path.name != MARKER]

    def apply(self, delta: Delta, to: Position) -> None:
        """Move to another position. Raises BadDigest before anything is written when the delta does not lead there;
        on any error the position is the old one, or is found again by opening the folder again."""
        digests = delta.digests_after(self.digests, self.weights)
        if root_of(self.table, digests) != to.root:
            raise BadDigest(f"{self.folder} at {self.position}: the change does not lead to {to}; nothing was written")
        journal = self.folder / f"{_JOURNAL}{to.run}-{to.version}-{to.root}"
        with replacing(journal) as aside, file_system_errors(str(journal)):
            aside.write_bytes(delta_file.encode(delta, codec="raw", base=self.weights))
            _flush(aside)
        _flush(self.folder)
        self._on_step("journal")
        self._redo(delta, journal, to)
        self.position, self.digests = to, digests

    def _redo(self, delta: Delta, journal: Path, to: Position) -> None:
        with _locked(self.folder / _READERS, fcntl.LOCK_EX):
            delta.apply_(self.weights)
            self._on_step("apply")
            self.weights.flush()
            self._on_step("sync")
            mark(self.folder, to)
        self._on_step("mark")
        journal.unlink()
        self._on_step("clean")

    def _repair(self) -> None:
        """Finish what a whole journal says; one that is not whole was never begun."""
        for journal in self.folder.glob(f"{_JOURNAL}*"):
            to = _named_position(journal)
            if to is None or to == held(self.folder):
                journal.unlink()
                continue
            try:
                rest = delta_file.decode(journal.read_bytes(), base=self.weights)
            except FormatError:
                journal.unlink()
                continue
            self._redo(rest, journal, to)
        for abandoned in self.folder.glob(".*.part"):
            abandoned.unlink(missing_ok=True)


@contextmanager
def reading(folder: Path) -> Iterator[tuple[Checkpoint, Position]]:
    """A mirror's weights and position, which stay as they are while the block runs; its writer waits.

    Raises NotFound for a folder that is no mirror.
    """
    with _locked(folder / _READERS, fcntl.LOCK_SH):
        if unfinished(folder):
            raise NotFound(f"{folder} was left half written by a process that was killed: open it for writing first")
        yield Checkpoint(folder), _require_held(folder)


def unfinished(folder: Path) -> bool:
    """Whether a writer was killed in the middle of an update: opening the folder for writing finishes it."""
    return any(folder.glob(f"{_JOURNAL}*"))


def held(folder: Path) -> Position | None:
    """The position a folder says it holds, or None."""
    try:
        return Position(**json.loads((folder / MARKER).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def mark(folder: Path, position: Position) -> None:
    """Say which position a folder holds, durably."""
    text = json.dumps({"run": position.run, "version": position.version, "root": position.root})
    with replacing(folder / MARKER) as aside, file_system_errors(str(folder)):
        aside.write_text(text)
        _flush(aside)
    _flush(folder)


@contextmanager
def building(folder: Path, position: Position) -> Iterator[Path]:
    """A folder to fill, which gets its name only when the block ends well: marked, and on the disk before it appears.

    Raises AlreadyExists for a folder that holds anything. Two processes must not make the same folder at once: what
    killed ones left beside it is removed.
    """
    with file_system_errors(str(folder)):
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise AlreadyExists(f"{folder} exists and does not hold {position}; name another folder or remove it")
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(f".{folder.name}-????????"):
            shutil.rmtree(left, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield work
        _finish(work, folder, position)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _finish(work: Path, folder: Path, position: Position) -> None:
    with file_system_errors(str(folder)):
        for path in work.iterdir():
            _flush(path)
        mark(work, position)
        work.chmod(0o755)
        work.rename(folder)  # takes the place of an empty folder, too
        _flush(folder.parent)


def _named_position(journal: Path) -> Position | None:
    run, _, rest = journal.name.removeprefix(_JOURNAL).partition("-")
    version, _, root = rest.partition("-")
    return Position(run, int(version), root) if version.isdecimal() and root.isalnum() else None


def _require_held(folder: Path) -> Position:
    position = held(folder)
    if position is None:
        raise NotFound(f"{folder} is no mirror: it has no {MARKER}")
    return position


def _locked(path: Path, how: int) -> BinaryIO:
    """An open file that holds a lock until it is closed."""
    with file_system_errors(str(path)):
        file = open(path, "ab")  # noqa: SIM115
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        file.close()
        raise AccessRefused(f"{path.parent} is being written by another process; stop it first") from None
    return file


def _flush(path: Path) -> None:
    """Do not return before the file or folder is on the disk."""
    with file_system_errors(str(path)):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
