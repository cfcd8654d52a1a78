"""What a codec is given and gives back: one tensor's streams, and the facts the file's header states about them."""

import sys

import numpy as np

from deltawire.errors import FormatError, TooLarge, Truncated
from deltawire.weights.bits import UInts

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

ZSTD: dict[int, int] = {
    zstd.CompressionParameter.compression_level: 1,
    zstd.CompressionParameter.min_match: 7,
    zstd.CompressionParameter.hash_log: 6,
}
"""zstd-1 made to look for few matches: these streams have an uneven histogram but no repeats, and the short matches
that plain zstd-1 finds in them cost more than Huffman alone (1.41 against 1.44 bytes per change on a real RL trace)."""
_STORED = bytes.fromhex("28b52ffd c0 38")
"""a frame's magic number, that eight bytes of content size follow and no dictionary or checksum, and a window of one
block: without a window of its own a frame's is its content, and decoders refuse more than 128 MiB of that"""
_BLOCK = 128 << 10
"""bytes of a block, at most"""


def compress(data: UInts, *, level: int | None = None) -> UInts:
    """A zstd frame (with its content size, without a checksum: the file has its own) as uint8. Without a `level` it is
    made as streams of changes want it."""
    raw = np.ascontiguousarray(data).data
    return np.frombuffer(zstd.compress(raw, options=ZSTD) if level is None else zstd.compress(raw, level), np.uint8)


def store(data: UInts) -> UInts:
    """A zstd frame with its content size that holds the bytes as they are, in blocks of type raw (RFC 8878 §3.1)."""
    raw = np.ascontiguousarray(data).reshape(-1)
    parts = [_STORED + raw.size.to_bytes(8, "little")]
    for start in range(0, max(raw.size, 1), _BLOCK):
        block = raw[start : start + _BLOCK]
        is_last = start + _BLOCK >= raw.size
        parts += [(block.size << 3 | is_last).to_bytes(3, "little"), block.tobytes()]
    return np.frombuffer(b"".join(parts), np.uint8)


def decompress(packed: UInts, *, limit: int, what: str) -> UInts:
    """The content of one zstd frame as uint8. Raises TooLarge before decompressing more than `limit` bytes,
    FormatError for anything but one whole frame."""
    try:
        size = zstd.get_frame_info(packed.data).decompressed_size
        if size is None:
            raise FormatError(f"{what}: the zstd frame does not say its size")
        if size > limit:
            raise TooLarge(f"{what}: {size:,} bytes where at most {limit:,} can belong")
        decompressor = zstd.ZstdDecompressor()
        data = decompressor.decompress(packed.data, max_length=size + 1)
    except zstd.ZstdError as error:
        raise FormatError(f"{what}: not a zstd frame ({error})") from None
    if len(data) != size or not decompressor.eof:
        raise Truncated(f"{what}: {len(data):,} bytes of {size:,}")
    if decompressor.unused_data:
        raise FormatError(f"{what}: {len(decompressor.unused_data):,} bytes after the zstd frame")
    return np.frombuffer(data, np.uint8)


def zigzag(steps: UInts) -> UInts:
    """Steps mod 2^bits as unsigned numbers that are small when the step is near 0 either way: 0, -1, 1, -2, 2 …"""
    signed = steps.view(f"<i{steps.itemsize}")
    folded: UInts = ((signed << 1) ^ (signed >> (8 * steps.itemsize - 1))).view(steps.dtype)
    return folded


def unzigzag(folded: UInts) -> UInts:
    """The inverse of `zigzag`."""
    one = folded.dtype.type(1)
    steps: UInts = (folded >> one) ^ np.negative(folded & one)
    return steps
