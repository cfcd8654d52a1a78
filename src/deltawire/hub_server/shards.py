"""How a shard is read and written: which chunks a file is made of, and which chunks lie in each xorb.

Layout, little-endian, in records of 48 bytes: a header; for each file a head, its segments and, if flagged, a
verification hash a segment and a SHA-256; a bookend; for each xorb a head and its chunks; a bookend; and, in what the
server answers only, a footer of 200 bytes.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from deltawire.errors import FormatError, Truncated, UnknownVersion
from deltawire.hub_server.xorbs import ChunkTable

MAX_SHARD_BYTES = 128 * 1024 * 1024
"""The client starts a new shard at 64 MiB."""

_TAG = b"HFRepoMetaData\0" + bytes.fromhex("556967456a7b815783a5bdd95ccdd14aa9")
_HEADER = struct.Struct("<32sQQ")
_FILE = struct.Struct("<32sII8x")
_SEGMENT = struct.Struct("<32s4xIII")
_XORB = struct.Struct("<32sIIII")
_CHUNK = struct.Struct("<32sIII4x")
_RECORD = 48
_FOOTER_BYTES = 200
_BOOKEND_HASH = b"\xff" * 32
_BOOKEND = _BOOKEND_HASH + bytes(16)
_HAS_VERIFICATION = 1 << 31
_HAS_SHA256 = 1 << 30
_INDEX_THIS_CHUNK = 1 << 31


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of consecutive chunks of one xorb, `first` up to and not including `last`, `length` bytes uncompressed."""

    xorb: bytes
    length: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file as the concatenation of segments, with a verification hash for each if the shard carries them."""

    hash: bytes
    segments: tuple[Segment, ...]
    verification: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class XorbRecord:
    """The chunks of a xorb as a shard states them: (hash, uncompressed length), and which of them ask to be indexed."""

    hash: bytes
    chunks: tuple[tuple[bytes, int], ...]
    flagged: frozenset[int]


@dataclass(frozen=True, slots=True)
class Shard:
    """What a client says after its xorbs are up: the files it made, and the xorbs that are new."""

    files: tuple[FileRecord, ...]
    xorbs: tuple[XorbRecord, ...]


def parse_shard(data: bytes) -> Shard:
    """Read a shard, with or without footer. Nothing in it is checked against the store.

    Raises Truncated, UnknownVersion; FormatError for bytes that are no shard.
    """
    if len(data) < _HEADER.size:
        raise Truncated(f"a shard of {len(data)} bytes is shorter than its header")
    tag, version, _ = _HEADER.unpack_from(data)
    if tag != _TAG:
        raise FormatError("not a shard: its first 32 bytes are not the tag")
    if version != 2:
        raise UnknownVersion(f"shard version {version}; version 2 is known")
    records = _Records(data, at=_HEADER.size)
    return Shard(tuple(_files(records)), tuple(_xorbs(records)))


def build_dedup_shard(xorbs: Iterable[tuple[bytes, int, ChunkTable]], *, now: int) -> bytes:
    """The answer to a dedup query: the given xorbs as (hash, stored bytes, chunks), good for a week from `now`.

    `now` is in seconds since 1970. No files, no lookup tables, and a zero HMAC key: chunk hashes are in the clear.
    """
    sections = [_HEADER.pack(_TAG, 2, _FOOTER_BYTES), _BOOKEND]
    raw_bytes = 0
    for digest, stored, table in xorbs:
        raw = table.raw_offsets
        raw_bytes += raw[-1]
        sections.append(_XORB.pack(digest, 0, len(table.hashes), raw[-1], stored))
        rows = zip(table.hashes, raw[:-1], table.lengths, strict=True)
        sections.extend(_CHUNK.pack(hash_, offset, length, 0) for hash_, offset, length in rows)
    sections.append(_BOOKEND)
    body = b"".join(sections)
    end = len(body)
    files_at, xorbs_at = _RECORD, 2 * _RECORD
    footer = struct.pack("<9Q", 1, files_at, xorbs_at, end, 0, end, 0, end, 0)  # three lookup tables of no rows
    footer += bytes(32) + struct.pack("<QQ", now, now + 7 * 86400) + bytes(48)
    footer += struct.pack("<4Q", 0, 0, raw_bytes, end)
    return body + footer


class _Records:
    """A cursor over 48-byte records that never reads past the end."""

    def __init__(self, data: bytes, *, at: int) -> None:
        self._data = data
        self._at = at

    def take(self, count: int) -> memoryview:
        """The next `count` records."""
        end = self._at + count * _RECORD
        if end > len(self._data):
            raise Truncated(f"shard ends at byte {len(self._data)}, {end - len(self._data)} bytes early")
        taken = memoryview(self._data)[self._at : end]
        self._at = end
        return taken


def _files(records: _Records) -> Iterable[FileRecord]:
    while True:
        digest, flags, count = _FILE.unpack(records.take(1))
        if digest == _BOOKEND_HASH:
            return
        segments = tuple(Segment(*fields) for fields in _SEGMENT.iter_unpack(records.take(count)))
        verification: tuple[bytes, ...] = ()
        if flags & _HAS_VERIFICATION:
            verification = tuple(digest for (digest,) in struct.iter_unpack("<32s16x", records.take(count)))
        if flags & _HAS_SHA256:
            records.take(1)
        yield FileRecord(digest, segments, verification)


def _xorbs(records: _Records) -> Iterable[XorbRecord]:
    while True:
        digest, _, count, _, _ = _XORB.unpack(records.take(1))
        if digest == _BOOKEND_HASH:
            return
        rows = list(_CHUNK.iter_unpack(records.take(count)))
        flagged = frozenset(number for number, row in enumerate(rows) if row[3] & _INDEX_THIS_CHUNK)
        yield XorbRecord(digest, tuple((row[0], row[2]) for row in rows), flagged)
