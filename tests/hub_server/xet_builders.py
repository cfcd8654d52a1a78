"""Xorbs and shards made by hand, so that tests can also make wrong ones."""

import struct
from collections.abc import Sequence

import lz4.frame

from deltawire.hub_server.xet_hashes import chunk_hash, file_hash, segment_hash, xorb_hash

TAG = b"HFRepoMetaData\0" + bytes.fromhex("556967456a7b815783a5bdd95ccdd14aa9")
BOOKEND = b"\xff" * 32 + bytes(16)


def nodes(chunks: Sequence[bytes]) -> list[tuple[bytes, int]]:
    """What hashing needs of some chunks."""
    return [(chunk_hash(chunk), len(chunk)) for chunk in chunks]


def chunk_record(chunk: bytes, *, scheme: int = 0, stored: bytes | None = None, length: int | None = None) -> bytes:
    """A chunk with its header; `stored` and `length` override what is true."""
    if stored is None:
        planes = b"".join(chunk[plane::4] for plane in range(4)) if scheme == 2 else chunk
        stored = lz4.frame.compress(planes) if scheme else planes
    sizes = len(stored).to_bytes(3, "little"), (len(chunk) if length is None else length).to_bytes(3, "little")
    return b"\0" + sizes[0] + bytes([scheme]) + sizes[1] + stored


def xorb(chunks: Sequence[bytes], *, scheme: int = 0) -> tuple[bytes, bytes]:
    """(hash, bytes) of a xorb."""
    return xorb_hash(nodes(chunks)), b"".join(chunk_record(chunk, scheme=scheme) for chunk in chunks)


def shard(
    chunks: Sequence[bytes],
    *,
    xorb: bytes | None = None,
    file: bytes | None = None,
    verification: bytes | None = None,
    length: int | None = None,
    last: int | None = None,
) -> bytes:
    """A shard with one file that is one whole xorb; each argument after the chunks overrides what is true."""
    digest = xorb_hash(nodes(chunks)) if xorb is None else xorb
    size = sum(map(len, chunks))
    out = TAG + struct.pack("<QQ", 2, 200)
    out += struct.pack("<32sIIQ", file or file_hash(nodes(chunks)), 1 << 31, 1, 0)
    out += struct.pack("<32sIIII", digest, 0, size if length is None else length, 0, last or len(chunks))
    out += (verification or segment_hash(chunk_hash(chunk) for chunk in chunks)) + bytes(16)
    out += BOOKEND
    out += struct.pack("<32sIIII", digest, 0, len(chunks), size, size)
    offset = 0
    for chunk in chunks:
        out += struct.pack("<32sIIII", chunk_hash(chunk), offset, len(chunk), 0, 0)
        offset += len(chunk)
    return out + BOOKEND
