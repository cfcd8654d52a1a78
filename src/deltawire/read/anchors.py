"""Anchors on this host: downloaded once, verified, opened only if they are what the run's table says."""

import os
import shutil
import tempfile
from pathlib import Path

from deltawire.buckets.atomic import file_system_errors, require_room
from deltawire.buckets.base import Bucket
from deltawire.buckets.verified import download_verified
from deltawire.errors import FormatError, ShapeMismatch
from deltawire.format import checkpoint, delta_file
from deltawire.format.checkpoint import Checkpoint
from deltawire.read.bases import base_of
from deltawire.runlog.bounds import require_anchor, require_codec, require_in_table, require_memory
from deltawire.runlog.keys import anchor_hash, payload_key
from deltawire.runlog.records import Commit, Derived, Position, Run
from deltawire.weights.table import aliases_of

_WHOLE = "whole"
"""the folder in which an anchor that comes in parts is put together"""


class Anchors:
    """The anchors one reader has fetched, in a temporary folder that `close` removes.

    `base` is a folder with the base checkpoint, for runs whose version 0 refers to one this host has elsewhere.
    """

    def __init__(self, bucket: Bucket, *, base: Path | None) -> None:
        self._bucket, self._base, self._owner = bucket, base, os.getpid()
        self._cache: Path | None = None
        self._sound: set[tuple[Position, Path]] = set()
        self.fetching: tuple[int, int] | None = None
        """bytes of an anchor that are here, and of how many, while one is downloaded"""

    def close(self) -> None:
        """Remove what was downloaded; checkpoints handed out before stop being usable."""
        if self._cache is not None and os.getpid() == self._owner:  # a forked child must not remove the parent's
            shutil.rmtree(self._cache, ignore_errors=True)
            self._cache = None
            self._sound.clear()

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
        if self._cache is None:
            with file_system_errors(f"{tempfile.gettempdir()} (TMPDIR chooses another disk)"):
                self._cache = Path(tempfile.mkdtemp(prefix="deltawire-"))
        folder = self._cache / f"{record.run}-{record.version}-{_content(record)}"
        if (whole := folder / _WHOLE).is_dir():
            return whole
        with file_system_errors(str(folder)):
            folder.mkdir(exist_ok=True)
        self._download(record, folder)
        files = sorted(folder.glob("*.safetensors"))
        parts = [path for path in files if delta_file.is_delta(checkpoint.metadata_of(path))]
        if parts and parts != files:
            raise FormatError(f"anchor {record.position} is both a checkpoint and changes from all-zero bits")
        return _put_together(folder, parts, record, run) if parts else folder

    def _download(self, record: Commit | Derived, folder: Path) -> None:
        paths = {payload: folder / payload.key.rsplit("/", 1)[-1] for payload in record.payloads}
        done, total = 0, record.wire_bytes
        require_room(folder, sum(payload.size for payload, path in paths.items() if not path.is_file()))
        try:
            for payload, path in paths.items():
                self.fetching = done, total
                if not path.is_file():
                    key = payload_key(record.run, payload.key)
                    download_verified(self._bucket, key, path, size=payload.size, blake3=payload.blake3)
                done += payload.size
        finally:
            self.fetching = None


def _content(record: Commit | Derived) -> str:
    """A name for what an anchor's record lists: two records of one version may list other files by the same names."""
    return anchor_hash({payload.key: payload.blake3 for payload in record.payloads})[:12]


def _put_together(folder: Path, parts: list[Path], record: Commit | Derived, run: Run) -> Path:
    """The checkpoint that an anchor's files add up to, where they are changes from all-zero bits; one in memory at a
    time. Raises OutOfSpace before anything is written where the table's weights do not fit; FormatError for a file that
    is not of this anchor, ShapeMismatch, UnknownTensor."""
    with tempfile.TemporaryDirectory(dir=folder) as work:
        aside = Path(work) / _WHOLE
        aside.mkdir()
        checkpoint.write_zeros(aside, run.table)
        weights, entries = Checkpoint(aside, writable=True), {entry.name: entry for entry in run.table}
        for path in parts:
            data = path.read_bytes()
            header = delta_file.read_header(data)
            if (header.run, header.parent, header.version) != (record.run, None, record.version):
                raise FormatError(f"anchor {record.position}: {path.name} is of {header.run}:{header.version}")
            require_codec(header.codec, run, f"anchor {record.position}: {path.name}")
            require_in_table(header.tensors, entries, f"anchor {record.position}: {path.name}")
            require_memory(header.tensors, f"anchor {record.position}: {path.name}")
            delta_file.decode(data).apply_(weights)
            path.unlink()
        weights.flush()
        checkpoint.copy_assets(folder, aside)
        return aside.rename(folder / _WHOLE)
