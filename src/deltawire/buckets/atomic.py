"""A file that appears whole or not at all, and what the file system's refusals are called."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deltawire.errors import AccessRefused, BucketError, NotFound, OutOfSpace, Unavailable

_KINDS: dict[int | None, tuple[type[BucketError], str]] = {
    errno.ENOSPC: (OutOfSpace, "; free some space and try again"),
    errno.EDQUOT: (OutOfSpace, "; free some space and try again"),
    errno.EACCES: (AccessRefused, "; check the owner and the mode"),
    errno.EPERM: (AccessRefused, "; check the owner, the mode and the kind of file system"),
    errno.EROFS: (AccessRefused, ""),
    errno.ENOENT: (NotFound, ""),
    errno.EEXIST: (BucketError, "; no key may be a folder of another"),
    errno.EISDIR: (BucketError, "; no key may be a folder of another"),
    errno.ENOTDIR: (BucketError, "; no key may be a folder of another"),
    # What network file systems say when the server is away for a moment.
    errno.ESTALE: (Unavailable, ""),
    errno.ETIMEDOUT: (Unavailable, ""),
    errno.EHOSTDOWN: (Unavailable, ""),
}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to: that file takes the place of `path` if the block succeeds, else it vanishes.

    Raises OutOfSpace, AccessRefused, Unavailable or BucketError, naming `path`, when the file system refuses.
    """
    temporary = path.with_name(f".{path.name[:64]}.{secrets.token_hex(6)}.part")
    with file_system_errors(str(path)):
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)  # on a read-only file system even this is refused


def require_room(folder: Path, size: int) -> None:
    """Raise OutOfSpace, before anything is written, unless the disk of a folder has room for so many bytes more."""
    with file_system_errors(str(folder)):
        free = shutil.disk_usage(folder).free
    if size > free:
        short = f"No space left on device: {size:,} bytes are needed, {free:,} are free"
        raise OutOfSpace(f"{folder}: {short}; TMPDIR chooses another disk")


@contextmanager
def file_system_errors(what: str) -> Iterator[None]:
    """Turn an OSError into the BucketError that says the same of `what`."""
    try:
        yield
    except OSError as error:
        if isinstance(error, TimeoutError) and error.errno is None:
            raise  # by a signal's handler, a watchdog's say, and no file's fault
        raise file_system_error(what, error) from error


def file_system_error(what: str, error: OSError, *, hint: str | None = None) -> BucketError:
    """The BucketError that says of `what` what an OSError says; `hint` replaces the usual next step."""
    kind, next_step = _KINDS.get(error.errno, (BucketError, ""))
    return kind(f"{what}: {error.strerror or error}{next_step if hint is None else hint}")
