"""Bytes from a bucket that are exactly the bytes promised: right length, right BLAKE3, or an error and nothing changed.

Needed for every store: hf_xet returns a flipped bit as a success, and a bucket may be written to by others.
"""

from pathlib import Path

from blake3 import blake3 as _Blake3  # noqa: N812 (the parameters below are called blake3)

from deltawire.buckets.atomic import replacing
from deltawire.buckets.base import Bucket
from deltawire.errors import BadDigest, Truncated


def get_verified(bucket: Bucket, key: str, *, size: int, blake3: str) -> bytes:
    """The object, `size` bytes long, whose BLAKE3 is `blake3` (64 hex digits).

    Raises Truncated, TooLarge or BadDigest when it is not, and what `bucket.get` raises.
    """
    data = bucket.get(key, limit=size)
    _check(bucket, key, len(data), size, _Blake3(data).hexdigest(), blake3)
    return data


def download_verified(bucket: Bucket, key: str, path: Path, *, size: int, blake3: str) -> None:
    """Put the object, `size` bytes long, whose BLAKE3 is `blake3` (64 hex digits), at `path`, which is replaced at once.

    Raises Truncated, TooLarge or BadDigest when it is not, and what `bucket.get_file` raises; `path` is then as it was.
    """
    with replacing(path) as temporary:
        bucket.get_file(key, temporary, limit=size)
        # Not mapped into memory: the file system's own bit rot would be a SIGBUS instead of an error.
        with open(temporary, "rb") as file:
            hasher = _Blake3()
            while chunk := file.read(1 << 20):
                hasher.update(chunk)
            _check(bucket, key, file.tell(), size, hasher.hexdigest(), blake3)


def _check(bucket: Bucket, key: str, size: int, promised_size: int, digest: str, promised_digest: str) -> None:
    if size < promised_size:
        raise Truncated(f"{bucket.url}/{key} has {size:,} of its {promised_size:,} bytes; download it again")
    if digest != promised_digest:
        raise BadDigest(
            f"{bucket.url}/{key} hashes to {digest}, not to the promised {promised_digest}; "
            "download it again, and if that repeats, the bucket's copy is damaged"
        )
