"""What a codec is given and gives back: one tensor's streams, and the facts the file's header states about them."""

import numpy as np
import zstandard

from deltawire.errors import FormatError, TooLarge, Truncated
from deltawire.weights.bits import UInts

ZSTD = zstandard.ZstdCompressionParameters.from_level(1, min_match=7, hash_log=6, write_content_size=True)
"""zstd-1 made to look for few matches: these streams have an uneven histogram but no repeats, and the short matches
that plain zstd-1 finds in them cost more than Huffman alone (1.41 against 1.44 bytes per change on a real RL trace)."""


def compress(data: UInts) -> UInts:
    """A zstd frame (with its content size, without a checksum: the file has its own) as uint8."""
    packed = zstandard.ZstdCompressor(compression_params=ZSTD).compress(np.ascontiguousarray(data).data)
    return np.frombuffer(packed, np.uint8)


def decompress(packed: UInts, *, limit: int, what: str) -> UInts:
    """The content of one zstd frame as uint8. Raises TooLarge before decompressing more than `limit` bytes,
    FormatError for anything but one whole frame."""
    try:
        size = zstandard.frame_content_size(packed.data)
        if size < 0:
            raise FormatError(f"{what}: the zstd frame does not say its size")
        if size > limit:
            raise TooLarge(f"{what}: {size:,} bytes where at most {limit:,} can belong")
        data = zstandard.ZstdDecompressor().decompress(packed.data, max_output_size=size or 1, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FormatError(f"{what}: not a zstd frame ({error})") from None
    if len(data) != size:
        raise Truncated(f"{what}: {len(data):,} bytes of {size:,}")
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
