"""Anchors on this host: downloaded once, verified, opened only if they are what the run's table says."""

import os
import tempfile
from collections.abc import Container
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np

from deltawire.buckets.atomic import file_system_errors, require_room
from deltawire.buckets.base import Bucket
from deltawire.buckets.temporary import TemporaryFolder
from deltawire.buckets.verified import download_verified, hash_file, require_file
from deltawire.errors import FormatError, ShapeMismatch
from deltawire.format import checkpoint, delta_file
from deltawire.format.checkpoint import Checkpoint
from deltawire.read.bases import base_of
from deltawire.read.host_cache import Held, HostCache
from deltawire.runlog.bounds import require_anchor, require_codec, require_in_table, require_memory
from deltawire.runlog.keys import anchor_hash, payload_key
from deltawire.runlog.records import Commit, Derived, Payload, Position, Run
from deltawire.weights.delta import Delta
from deltawire.weights.table import aliases_of

_WHOLE = "whole"
"""the folder in which an anchor that comes in parts is put together"""
_MADE = "whole.json"
"""the hashes of what was put together, for those that find it in the host's cache"""


class Anchors:
    """The anchors one reader has fetched: in the cache that the readers of this host share, or else in a temporary
    folder that `close` removes.

    `base` is a folder with the base checkpoint, for runs whose version 0 refers to one this host has elsewhere.
    """

    def __init__(self, bucket: Bucket, *, base: Path | None, cache: HostCache | None = None) -> None:
        self._bucket, self._base, self._cache, self._owner = bucket, base, cache, os.getpid()
        self._temporary: TemporaryFolder | None = None
        self._held: dict[str, Held] = {}
        self._sound: set[tuple[Position, Path]] = set()
        self.fetching: tuple[int, int] | None = None
        """bytes of an anchor that are here, and of how many, while one is downloaded"""

    def close(self) -> None:
        """Let go of what was downloaded; checkpoints handed out before stop being usable."""
        if os.getpid() != self._owner:  # a forked child must not remove the parent's
            return
        for held in self._held.values():
            held.close()
        self._held.clear()
        self._sound.clear()
        if self._temporary is not None:
            self._temporary.close()
            self._temporary = None

    def open(self, record: Commit | Derived, run: Run) -> Checkpoint:
        """The anchor that a record describes. A base may hold aliases, which are passed over; no other anchor does.
        Raises BucketError; FormatError unless it holds the run's whole table, and nothing twice."""
        aliases = aliases_of(run.table)
        weights = Checkpoint(self.folder(record, run), without=() if record.payloads else aliases)
        if twice := aliases.keys() & weights.keys():
            alias = min(twice)
            raise FormatError(f"anchor {record.position} holds {aliases[alias]!r} again as its alias {alias!r}")
        for entry in run.table:
            if entry.name not in weights:
                raise FormatError(f"anchor {record.position} lacks tensor {entry.name!r}")
            bits = weights[entry.name]
            if (bits.dtype, bits.shape) != (entry.dtype, entry.shape):
                raise ShapeMismatch(f"anchor {record.position}: {entry.name} is {bits.dtype} {list(bits.shape)}")
        return weights

    def sound(self, record: Commit | Derived, run: Run) -> Checkpoint:
        """As `open`, its weights as the record promises: the mirror that they were written from may have rotted. They
        are digested once. Raises BadDigest, too."""
        weights = self.open(record, run)
        if (record.position, weights.folder) not in self._sound:
            promised = {name: int(value, 16) for name, value in record.digests.items()}
            weights.require_digests(promised, where=f"anchor {record.position}")
            self._sound.add((record.position, weights.folder))
        return weights

    def folder(self, record: Commit | Derived, run: Run) -> Path:
        """Where the files of an anchor are, downloaded and verified if need be; a run's base where it is one."""
        if not record.payloads:
            return self._base or base_of(run)
        require_anchor(record, run.table, f"anchor {record.position}")
        name = f"{record.run}-{record.version}-{_content(record)}"
        if (folder := self._shared(name, record, run)) is not None:
            return folder
        if self._temporary is None:
            self._temporary = TemporaryFolder()
        folder = self._temporary.path / name
        if not (folder / _WHOLE).is_dir():
            with file_system_errors(str(folder)):
                folder.mkdir(exist_ok=True)
            self._make(folder, record, run)
        return _where(folder)

    def _shared(self, name: str, record: Commit | Derived, run: Run) -> Path | None:
        """An anchor's files in the cache of this host; None where it has none for us. What another process put there is
        hashed before it is used, and fetched again where it is damaged."""
        if (kept := self._held.get(name)) is not None:
            return _where(kept.path)
        for _ in range(2 if self._cache is not None else 0):
            made: list[Path] = []

            def fill(folder: Path, made: list[Path] = made) -> None:
                made += self._make(folder, record, run)

            assert self._cache is not None
            if (held := self._cache.hold(name, record.wire_bytes, fill, source=self._bucket.url)) is None:
                return None
            with suppress(OSError, FormatError, msgspec.DecodeError):
                _require_files(held.path, record, without={path.name for path in made})
                self._held[name] = held
                return _where(held.path)
            held.discard()
        return None

    def _make(self, folder: Path, record: Commit | Derived, run: Run) -> list[Path]:
        """Download the files of an anchor that a folder lacks, and put them together where they are parts. The files
        that were downloaded, and verified on their way."""
        if (folder / _WHOLE).is_dir():  # by one that was killed just then
            return []
        downloaded = self._download(record, folder)
        files = sorted(folder.glob("*.safetensors"))
        parts = [path for path in files if delta_file.is_delta(checkpoint.metadata_of(path))]
        if parts and parts != files:
            raise FormatError(f"anchor {record.position} is both a checkpoint and changes from all-zero bits")
        if parts:
            _put_together(folder, parts, record, run)
        return downloaded

    def _download(self, record: Commit | Derived, folder: Path) -> list[Path]:
        paths = {payload: folder / _name(payload) for payload in record.payloads}
        done, total, downloaded = 0, record.wire_bytes, []
        require_room(folder, sum(payload.size for payload, path in paths.items() if not path.is_file()))
        try:
            for payload, path in paths.items():
                self.fetching = done, total
                if not path.is_file():
                    key = payload_key(record.run, payload.key)
                    download_verified(self._bucket, key, path, size=payload.size, blake3=payload.blake3)
                    downloaded.append(path)
                done += payload.size
        finally:
            self.fetching = None
        return downloaded


def _name(payload: Payload) -> str:
    """A payload's file in the folder of its anchor."""
    return payload.key.rsplit("/", 1)[-1]


def _where(folder: Path) -> Path:
    """The checkpoint in an anchor's folder."""
    return whole if (whole := folder / _WHOLE).is_dir() else folder


def _require_files(folder: Path, record: Commit | Derived, *, without: Container[str]) -> None:
    """Raise FormatError or OSError unless the files of an anchor are what its record lists, or what was made of that;
    those in `without` were looked at."""
    if (folder / _WHOLE).is_dir():
        made = msgspec.json.decode((folder / _MADE).read_bytes(), type=dict[str, Payload])
        promised = {folder / _WHOLE / name: payload for name, payload in made.items()}
    else:
        promised = {folder / _name(payload): payload for payload in record.payloads if _name(payload) not in without}
    for path, payload in promised.items():
        require_file(str(path), path, size=payload.size, blake3=payload.blake3)


def _content(record: Commit | Derived) -> str:
    """A name for what an anchor's record lists: two records of one version may list other files by the same names."""
    return anchor_hash({payload.key: payload.blake3 for payload in record.payloads})[:12]


def _put_together(folder: Path, parts: list[Path], record: Commit | Derived, run: Run) -> None:
    """The checkpoint that an anchor's files add up to, where they are changes from all-zero bits; one tensor in memory
    at a time. Raises OutOfSpace before anything is written where the table's weights do not fit; FormatError for a file
    that is not of this anchor, ShapeMismatch, UnknownTensor."""
    with tempfile.TemporaryDirectory(prefix=".", dir=folder) as work:
        aside = Path(work) / _WHOLE
        aside.mkdir()
        checkpoint.write_zeros(aside, run.table)
        weights, entries = Checkpoint(aside, writable=True), {entry.name: entry for entry in run.table}
        for path in parts:
            file = delta_file.open_file(np.memmap(path, np.uint8, "r").data)
            header = file.header
            if (header.run, header.parent, header.version) != (record.run, None, record.version):
                raise FormatError(f"anchor {record.position}: {path.name} is of {header.run}:{header.version}")
            require_codec(header.codec, run, f"anchor {record.position}: {path.name}")
            require_in_table(header.tensors, entries, f"anchor {record.position}: {path.name}")
            require_memory(header.tensors, f"anchor {record.position}: {path.name}")
            for name in file.names:
                Delta({name: file.tensor(name)}).apply_(weights)
            path.unlink()
        weights.flush()
        checkpoint.copy_assets(folder, aside)
        made = {path.name: Payload(path.name, path.stat().st_size, hash_file(path)) for path in aside.iterdir()}
        (folder / _MADE).write_bytes(msgspec.json.encode(made))
        aside.rename(folder / _WHOLE)
