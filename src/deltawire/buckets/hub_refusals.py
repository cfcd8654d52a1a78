"""What the Hub's client says in words alone: failed paths of a batch, and folders of this host that it cannot use."""

import errno
import os
import re
from collections.abc import Iterable, Mapping

from deltawire.buckets.refusals import of_this_host
from deltawire.errors import AccessRefused, BucketError, OutOfSpace, Unavailable

_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_OF_FILES = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EEXIST, errno.EISDIR),
        *(errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE),
    }
)
_FINAL: tuple[tuple[re.Pattern[str], type[BucketError], str], ...] = (
    (re.compile(r"quota|storage limit|no space|insufficient storage", re.I), OutOfSpace, "free some, or ask for more"),
    (re.compile(r"forbidden|unauthori[sz]ed|permission|denied|not allowed", re.I), AccessRefused, "check the token"),
    (re.compile(r"invalid|malformed|\bpath has\b|too (long|large)", re.I), BucketError, "the Hub never takes this"),
)


def batch_refusal(where: str, failures: Iterable[Mapping[str, str]]) -> BucketError:
    """The error for a batch of which some paths failed. Batches are not transactional, so the next try of the same
    batch may succeed: Unavailable, unless a path's reason is one that stays."""
    reasons = [str(failure.get("error", "")) for failure in failures]
    for pattern, kind, hint in _FINAL:
        for reason in reasons:
            if pattern.search(reason):
                return kind(f"{where}: {reason}; {hint}")
    said = reasons[0] if reasons else "no reason was given"
    return Unavailable(f"{where}: the batch was not done in full: {said}; the same batch may succeed")


def local_refusal(where: str, error: Exception) -> BucketError | None:
    """The error when the client failed on this host's own files, naming the folder and the variable that moves it."""
    if isinstance(error, ConnectionError | TimeoutError) or not isinstance(error, OSError | RuntimeError):
        return None
    found = _OS_ERROR.search(str(error))
    number = (error.errno if isinstance(error, OSError) else None) or (int(found[1]) if found else None)
    if number not in _OF_FILES:
        return None
    folder, variable = _xet_folder()
    path = str((error.filename if isinstance(error, OSError) else None) or folder)
    variable = variable if path.startswith(folder) else "HF_HOME"
    what = f"{where}: the Hub's client cannot use {path} on this host ({variable} moves it)"
    return of_this_host(what, OSError(number, os.strerror(number or 0)))


def _xet_folder() -> tuple[str, str]:
    """Where hf_xet keeps its state, and the variable that says so."""
    if folder := os.environ.get("HF_XET_CACHE"):
        return folder, "HF_XET_CACHE"
    home = os.environ.get("HF_HOME") or os.path.join(os.path.expanduser("~"), ".cache", "huggingface")
    return os.path.join(home, "xet"), "HF_HOME or HF_XET_CACHE"
