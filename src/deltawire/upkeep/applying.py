"""Delta files applied to a checkpoint folder by hand, without a bucket."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deltawire.buckets.atomic import file_system_errors
from deltawire.errors import AlreadyExists, Gap, NeedsBase
from deltawire.format import checkpoint, delta_file
from deltawire.format.checkpoint import Checkpoint
from deltawire.format.delta_file import DeltaHeader
from deltawire.read.mirror import MARKER, held


@dataclass(frozen=True, slots=True)
class ApplyReport:
    """A checkpoint with deltas applied: the folder, how many files, and how many elements they changed in all."""

    folder: Path
    files: int
    changed: int


def apply_files(folder: Path, deltas: Sequence[Path], out: Path, *, undo: bool = False) -> ApplyReport:
    """Write a copy of a checkpoint folder with delta files applied in the order given, or with `undo` taken back.

    Files say which versions they join: each must continue the one before it, and the first the version that the folder
    says it holds, if it does. The folder appears whole or not at all; the first is left as it is.

    Raises Gap for a file that does not continue, AlreadyExists for an `out` that is there, NeedsBase for a file of
    absolute values with `undo`, and what decoding raises.
    """
    if out.exists():
        raise AlreadyExists(f"{out} is there already; name another folder")
    sources = [path for path in checkpoint.files(folder) if path.name != MARKER]
    position = held(folder)
    here = None if position is None else (position.run, position.version)
    with file_system_errors(str(out)):
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        checkpoint.copy(sources, work)
        changed = 0
        weights = Checkpoint(work, writable=True)
        for path in deltas:
            data = path.read_bytes()
            here = _next(delta_file.read_header(data), here, path, undo=undo)
            delta = delta_file.decode(data, base=weights)
            (-delta if undo else delta).apply_(weights)
            changed += delta.changed
        weights.flush()
        with file_system_errors(str(out)):
            work.chmod(0o755)
            work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return ApplyReport(out, len(deltas), changed)


def _next(header: DeltaHeader, here: tuple[str, int] | None, path: Path, *, undo: bool) -> tuple[str, int] | None:
    """Where a copy stands after a file. Raises Gap, NeedsBase."""
    if undo and header.codec in delta_file.NEED_BASE:
        what = "holds absolute values" if header.codec == "raw" else f'is of codec "{header.codec}"'
        raise NeedsBase(f"{path} {what}, which takes the weights before it to read: it cannot be taken back")
    if header.run is None or header.parent is None or header.version is None:
        return None
    start, end = (header.version, header.parent) if undo else (header.parent, header.version)
    if here is not None and here != (header.run, start):
        raise Gap(f"{path} leads from {header.run}:{start}, and these weights are {here[0]}:{here[1]}")
    return header.run, end
