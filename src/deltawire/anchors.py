"""Anchors on this host: downloaded once, verified, opened only if they are what the run's table says."""

import shutil
import tempfile
from pathlib import Path

from deltawire.bases import base_of
from deltawire.buckets.atomic import file_system_errors
from deltawire.buckets.base import Bucket
from deltawire.buckets.verified import download_verified
from deltawire.checkpoint import Checkpoint
from deltawire.errors import FormatError, ShapeMismatch
from deltawire.manifests import Commit, Derived, Run


class Anchors:
    """The anchors one reader has fetched, in a temporary folder that `close` removes.

    `base` is a folder with the base checkpoint, for runs whose version 0 refers to one this host has elsewhere.
    """

    def __init__(self, bucket: Bucket, *, base: Path | None) -> None:
        self._bucket, self._base = bucket, base
        self._cache: Path | None = None

    def close(self) -> None:
        """Remove what was downloaded; checkpoints handed out before stop being usable."""
        if self._cache is not None:
            shutil.rmtree(self._cache, ignore_errors=True)
            self._cache = None

    def open(self, record: Commit | Derived, run: Run) -> Checkpoint:
        """The anchor that a record describes. Raises BucketError; FormatError unless it holds the run's whole table."""
        checkpoint = Checkpoint(self.folder(record, run))
        for entry in run.table:
            if entry.name not in checkpoint:
                raise FormatError(f"anchor {record.position} lacks tensor {entry.name!r}")
            bits = checkpoint[entry.name]
            if (bits.dtype, bits.shape) != (entry.dtype, entry.shape):
                raise ShapeMismatch(f"anchor {record.position}: {entry.name} is {bits.dtype} {list(bits.shape)}")
        return checkpoint

    def folder(self, record: Commit | Derived, run: Run) -> Path:
        """Where the files of an anchor are, downloaded and verified if need be; a run's base where it is one."""
        if not record.payloads:
            return self._base or base_of(run)
        if self._cache is None:
            with file_system_errors(f"{tempfile.gettempdir()} (TMPDIR chooses another disk)"):
                self._cache = Path(tempfile.mkdtemp(prefix="deltawire-"))
        folder = self._cache / f"{record.run}-{record.version}"
        with file_system_errors(str(folder)):
            folder.mkdir(exist_ok=True)
        for payload in record.payloads:
            path = folder / payload.key.rsplit("/", 1)[-1]
            if not path.is_file():
                key = f"runs/{record.run}/{payload.key}"
                download_verified(self._bucket, key, path, size=payload.size, blake3=payload.blake3)
        return folder
