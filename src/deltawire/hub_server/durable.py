"""How bytes become a file that survives a power cut: flushed under a temporary name, renamed, folder flushed."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deltawire.errors import OutOfSpace

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def no_space_is_typed(root: Path) -> Iterator[None]:
    """Turn "no space left", "over quota" and "file too large" into OutOfSpace; let other errors of the disk through."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise OutOfSpace(f"no space left under {root}: {error.strerror}; free some and send it again") from error
        raise


def move_into_place(finished: Path, destination: Path) -> None:
    """Flush `finished`, rename it to `destination` (same file system) and flush the folder: all or nothing."""
    flush(finished)
    finished.replace(destination)
    flush(destination.parent)


def flush(path: Path) -> None:
    """Do not return before the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
