"""Bytes from a bucket that are exactly the bytes promised: right length, right BLAKE3, or an error and nothing changed.

Needed for every store: hf_xet returns a flipped bit as a success, and a bucket may be written to by others.
"""

import mmap
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3 as _Blake3  # noqa: N812 (the parameters below are called blake3)

from deltawire.buckets.atomic import replacing
from deltawire.buckets.base import Bucket
from deltawire.errors import BadDigest, Truncated


def get_verified(bucket: Bucket, key: str, *, size: int, blake3: str) -> bytes:
    """The object, `size` bytes long, whose BLAKE3 is `blake3` (64 hex digits).

    Raises Truncated, TooLarge or BadDigest when it is not, and what `bucket.get` raises.
    """
    data = bucket.get(key, limit=size)
    require_bytes(f"{bucket.url}/{key}", data, size=size, blake3=blake3)
    return data


def download_verified(bucket: Bucket, key: str, path: Path, *, size: int, blake3: str) -> None:
    """Replace `path` by the object, `size` bytes long, whose BLAKE3 is `blake3` (64 hex digits).

    Raises Truncated, TooLarge or BadDigest when it is not, and what `bucket.get_file` raises; `path` is then as it was.
    """
    with replacing(path) as temporary:
        bucket.get_file(key, temporary, limit=size)
        require_file(f"{bucket.url}/{key}", temporary, size=size, blake3=blake3)


def require_bytes(where: str, data: bytes, *, size: int, blake3: str) -> None:
    """Raise Truncated or BadDigest, naming `where`, unless these bytes are those promised."""
    _check(where, len(data), _Blake3(data).hexdigest(), size=size, blake3=blake3)


def require_file(where: str, path: Path, *, size: int, blake3: str) -> None:
    """Raise Truncated or BadDigest, naming `where`, unless a file's bytes are those promised; OSError where it cannot
    be read."""
    with open(path, "rb") as file:
        _require_content(where, file, size=size, blake3=blake3)


def map_verified(path: Path, *, size: int, blake3: str) -> memoryview:
    """The bytes of a file, verified and then mapped: processes that map it share one memory. The file may be removed or
    replaced meanwhile, but nobody may write into it. Raises Truncated, BadDigest, OSError."""
    with open(path, "rb") as file:
        _require_content(str(path), file, size=size, blake3=blake3)
        return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b"")


def _require_content(where: str, file: BinaryIO, *, size: int, blake3: str) -> None:
    # Read and not mapped: the file system's own bit rot would be a SIGBUS instead of an error.
    hasher = _Blake3()
    while chunk := file.read(1 << 20):
        hasher.update(chunk)
    _check(where, file.tell(), hasher.hexdigest(), size=size, blake3=blake3)


def hash_file(path: Path) -> str:
    """The BLAKE3 of a file, in hex."""
    return _Blake3(max_threads=_Blake3.AUTO).update_mmap(path).hexdigest()


def _check(where: str, found_size: int, found_digest: str, *, size: int, blake3: str) -> None:
    if found_size < size:
        raise Truncated(f"{where} has {found_size:,} of its {size:,} bytes; download it again")
    if found_digest != blake3:
        raise BadDigest(
            f"{where} hashes to {found_digest}, not to the promised {blake3}; "
            "download it again, and if that repeats, the bucket's copy is damaged"
        )
