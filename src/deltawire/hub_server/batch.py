"""What a batch asks of a bucket: one JSON object a line, each an operation or a stated reason why it is none."""

import json
import re
from dataclasses import dataclass, replace
from typing import Any

from deltawire.errors import FormatError, TooLarge
from deltawire.hub_server.xet_hashes import from_text

MAX_OPERATIONS = 1000
"""As the Hub; the client sends longer lists as several batches."""
MAX_BATCH_BYTES = 8 * 1024 * 1024
MAX_PATH_BYTES = 1024
MAX_MTIME_MS = 253_402_300_799_999
"""The end of the year 9999."""

_CONTENT_TYPE = re.compile(r"[ -~]{1,255}")


@dataclass(frozen=True, slots=True)
class PutFile:
    """Make `path` the file with this hash: an upload just made, or a copy of what is stored."""

    path: str
    xet_hash: bytes
    mtime_ms: int
    content_type: str | None
    source: str | None = None
    """the bucket a copy is made from, where the client says it"""
    copied: bool = False


@dataclass(frozen=True, slots=True)
class DeleteFile:
    """Remove `path`."""

    path: str


@dataclass(frozen=True, slots=True)
class Failure:
    """An operation that was not done, and why."""

    path: str
    error: str


def parse_batch(body: bytes) -> list[PutFile | DeleteFile | Failure]:
    """The operations of an NDJSON body, in order; a line that cannot be done is a Failure in its place.

    Raises FormatError if a line is not a JSON object with a path; TooLarge beyond 1,000 operations.
    """
    lines = [line for line in body.split(b"\n") if line.strip()]
    if len(lines) > MAX_OPERATIONS:
        raise TooLarge(f"a batch of {len(lines)} operations; {MAX_OPERATIONS} is the most, send several")
    return [_parse_line(number, line) for number, line in enumerate(lines, start=1)]


def path_problem(path: str) -> str | None:
    """Why a path cannot be a key in a bucket, by the Hub's rules; None if it can."""
    try:
        length = len(path.encode())
    except UnicodeEncodeError:
        return "the path is not valid Unicode"
    if not path or length > MAX_PATH_BYTES:
        return f"a path has 1 to {MAX_PATH_BYTES} bytes"
    if "\0" in path or "\\" in path:
        return "the path has a backslash or a NUL"
    if any(part in ("", ".", "..") for part in path.split("/")):
        return "the path has an empty, '.' or '..' part"
    return None


def _parse_line(number: int, line: bytes) -> PutFile | DeleteFile | Failure:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        raise FormatError(f"line {number} of the batch is not JSON; nothing was done") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("path"), str):
        raise FormatError(f"line {number} of the batch has no path; nothing was done")
    path = fields["path"]
    if problem := path_problem(path):
        return Failure(path.encode("utf-8", "replace").decode(), problem)
    match fields.get("type"):
        case "addFile":
            return _parse_put(path, fields)
        case "copyFile":
            return _parse_copy(path, fields)
        case "deleteFile":
            return DeleteFile(path)
        case other:
            return Failure(path, f"unknown operation {other!r}")


def _parse_copy(path: str, fields: dict[str, Any]) -> PutFile | Failure:
    if fields.get("sourceRepoType", "bucket") != "bucket":
        return Failure(path, "this server copies from buckets alone")
    source, put = fields.get("sourceRepoId"), _parse_put(path, fields)
    if isinstance(put, Failure) or source is None:
        return put if isinstance(put, Failure) else replace(put, copied=True)
    if not isinstance(source, str):
        return Failure(path, "sourceRepoId is not a bucket")
    return replace(put, source=source, copied=True)


def _parse_put(path: str, fields: dict[str, Any]) -> PutFile | Failure:
    content_type = fields.get("contentType")
    mtime = fields.get("mtime")
    if not isinstance(fields.get("xetHash"), str):
        return Failure(path, "xetHash is missing")
    if isinstance(mtime, bool) or not isinstance(mtime, int | float) or not 0 <= mtime <= MAX_MTIME_MS:
        return Failure(path, "mtime is not a number of milliseconds since 1970")
    if content_type is not None and not (isinstance(content_type, str) and _CONTENT_TYPE.fullmatch(content_type)):
        return Failure(path, "contentType is not a media type")
    try:
        return PutFile(path, from_text(fields["xetHash"]), int(mtime), content_type)
    except FormatError as error:
        return Failure(path, str(error))
