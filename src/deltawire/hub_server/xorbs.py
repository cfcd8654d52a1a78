"""What a xorb is made of: chunks back to back, each with an 8-byte header, decoded and hashed one at a time.

Chunk header: u8 version (0), u24 stored length, u8 scheme, u24 uncompressed length; little-endian. Schemes: 0 as is, 1
an LZ4 frame, 2 bytes grouped by their position modulo 4 and then an LZ4 frame.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import BinaryIO

import lz4.frame

from deltawire.errors import BadDigest, FormatError, TooLarge, Truncated
from deltawire.hub_server.xet_hashes import chunk_hash, to_text, xorb_hash

MAX_CHUNKS = 8192
MAX_CHUNK_BYTES = 128 * 1024
"""Largest uncompressed chunk: the chunker aims at 64 KiB and cuts at twice that."""
HEADER_BYTES = 8
MAX_XORB_BYTES = 64 * 1024 * 1024 + MAX_CHUNKS * HEADER_BYTES

_FOOTER_MAGIC = b"XETBLOB"
_ROW = struct.Struct("<32sII")


class Damaged(BadDigest):
    """The disk no longer gives the bytes that were once verified."""


@dataclass(frozen=True)
class ChunkTable:
    """Where each chunk of a xorb lies and what it hashes to. The three tuples are parallel, one item a chunk."""

    hashes: tuple[bytes, ...]
    lengths: tuple[int, ...]
    """uncompressed bytes"""
    ends: tuple[int, ...]
    """offset in the xorb, in bytes, just after the chunk's stored bytes"""

    def start(self, chunk: int) -> int:
        """The offset in the xorb, in bytes, of a chunk's header."""
        return self.ends[chunk - 1] if chunk else 0

    @cached_property
    def raw_offsets(self) -> tuple[int, ...]:
        """One item more than there are chunks: uncompressed bytes before each chunk, and in all."""
        return tuple(accumulate(self.lengths, initial=0))

    def pack(self) -> bytes:
        """The table as 40 bytes a chunk."""
        rows = zip(self.hashes, self.lengths, self.ends, strict=True)
        return b"".join(_ROW.pack(*row) for row in rows)

    @classmethod
    def unpack(cls, packed: bytes) -> "ChunkTable":
        """The table that `pack` wrote."""
        hashes, lengths, ends = zip(*_ROW.iter_unpack(packed), strict=True)
        return cls(hashes, lengths, ends)


def verify_xorb(file: BinaryIO, expected: bytes) -> ChunkTable:
    """Read a whole xorb, decode and hash every chunk, and return its table.

    A footer after the last chunk is tolerated and not part of the table.
    Raises Truncated, TooLarge, FormatError; BadDigest if the chunks do not hash to `expected`.
    """
    hashes: list[bytes] = []
    lengths: list[int] = []
    ends: list[int] = []
    while (chunk := _read_chunk(file)) is not None:
        if len(hashes) == MAX_CHUNKS:
            raise TooLarge(f"xorb {to_text(expected)} has more than {MAX_CHUNKS} chunks")
        hashes.append(chunk_hash(chunk))
        lengths.append(len(chunk))
        ends.append(file.tell())
    if not hashes:
        raise FormatError(f"xorb {to_text(expected)} has no chunks")
    found = xorb_hash(zip(hashes, lengths, strict=True))
    if found != expected:
        raise BadDigest(f"xorb sent as {to_text(expected)} hashes to {to_text(found)}; send it again")
    return ChunkTable(tuple(hashes), tuple(lengths), tuple(ends))


def read_chunks(file: BinaryIO, table: ChunkTable, first: int, last: int) -> Iterator[bytes]:
    """The uncompressed chunks `first` up to and not including `last`, each checked against the table.

    Raises Damaged when the stored bytes are not those that were once verified.
    """
    file.seek(table.start(first))
    for number in range(first, last):
        try:
            chunk = _read_chunk(file)
        except FormatError as error:
            raise Damaged(f"stored chunk {number} is damaged: {error}") from error
        if chunk is None or chunk_hash(chunk) != table.hashes[number]:
            raise Damaged(f"stored chunk {number} is damaged: it no longer has its hash")
        yield chunk


def _read_chunk(file: BinaryIO) -> bytes | None:
    """The next chunk, uncompressed; None at the end of the chunks, with the file left just after the last one."""
    at = file.tell()
    header = file.read(HEADER_BYTES)
    if not header or header.startswith(_FOOTER_MAGIC):
        file.seek(at)
        return None
    if len(header) < HEADER_BYTES:
        raise Truncated(f"chunk header at byte {at} is cut off")
    stored_length = int.from_bytes(header[1:4], "little")
    raw_length = int.from_bytes(header[5:8], "little")
    if header[0] != 0:
        raise FormatError(f"chunk at byte {at} has version {header[0]}, not 0")
    if raw_length > MAX_CHUNK_BYTES or stored_length > 2 * MAX_CHUNK_BYTES:
        raise TooLarge(f"chunk at byte {at} says {raw_length} bytes; {MAX_CHUNK_BYTES} is the most")
    stored = file.read(stored_length)
    if len(stored) < stored_length:
        raise Truncated(f"chunk at byte {at} is cut off")
    chunk = _decode(stored, scheme=header[4], length=raw_length)
    if not chunk or len(chunk) != raw_length:
        raise FormatError(f"chunk at byte {at} says {raw_length} bytes and decodes to {len(chunk)}")
    return chunk


def _decode(stored: bytes, *, scheme: int, length: int) -> bytes:
    if scheme == 0:
        return stored
    if scheme not in (1, 2):
        raise FormatError(f"unknown chunk compression {scheme}; 0, 1 and 2 are known")
    frame = lz4.frame.LZ4FrameDecompressor()
    try:
        chunk: bytes = frame.decompress(stored, max_length=length + 1)
    except RuntimeError as error:
        raise FormatError(f"bad LZ4 frame: {error}") from None
    return chunk if scheme == 1 else _ungroup(chunk)


def _ungroup(grouped: bytes) -> bytes:
    """Undo byte grouping: four planes, byte i of the chunk in plane i % 4."""
    chunk = bytearray(len(grouped))
    at = 0
    for plane in range(4):
        length = (len(grouped) - plane + 3) // 4
        chunk[plane::4] = grouped[at : at + length]
        at += length
    return bytes(chunk)
