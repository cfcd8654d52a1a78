"""What is stored by hash: xorbs as files on disk, and in the database their chunks, the files made of them, and the
index that answers dedup queries.

A xorb is on the disk before its row is; a row is committed before anything refers to it. So after a crash there may be
a xorb file without a row, which is never served and is written again on the next upload, but never the reverse.
"""

import sqlite3
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from deltawire.errors import BadDigest, FormatError, NotFound
from deltawire.hub_server.database import Database
from deltawire.hub_server.durable import move_into_place, no_space_is_typed
from deltawire.hub_server.reconstruct import Reconstruction
from deltawire.hub_server.shards import FileRecord, Segment, Shard, XorbRecord, build_dedup_shard, parse_shard
from deltawire.hub_server.xet_hashes import EMPTY_FILE, file_hash, last_word, segment_hash, to_text
from deltawire.hub_server.xorbs import ChunkTable, read_chunks, verify_xorb

_SEGMENT = struct.Struct("<32sIII")
_INDEX_ONE_CHUNK_IN = 1024


class Content:
    """The xorbs, files and dedup index under one folder. Thread-safe; every method may wait for the disk."""

    def __init__(self, folder: Path, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._database = database
        self._clock = clock

    def xorb_path(self, digest: bytes) -> Path:
        """Where a xorb's bytes are, or would be."""
        return self._folder / to_text(digest)

    def remove_strays(self) -> None:
        """Delete xorb files without a row: a crash came between the two."""
        with self._database.read() as connection:
            known = {to_text(digest) for (digest,) in connection.execute("SELECT hash FROM xorbs")}
        for path in self._folder.iterdir():
            if path.name not in known:
                path.unlink()

    def has_xorb(self, digest: bytes) -> bool:
        """Whether the xorb is stored, verified and durable."""
        with self._database.read() as connection:
            return connection.execute("SELECT 1 FROM xorbs WHERE hash = ?", (digest,)).fetchone() is not None

    def xorb_table(self, digest: bytes) -> ChunkTable:
        """The chunks of a stored xorb. Raises NotFound."""
        with self._database.read() as connection:
            return _xorb_table(connection, digest)

    def holds(self, user: str | None, *digests: bytes) -> bool:
        """Whether a user has sent all of these xorbs or files; None, on a server without users, may use any."""
        if user is None:
            return True
        with self._database.read() as connection:
            query = "SELECT 1 FROM holders WHERE hash = ? AND user = ?"
            return all(connection.execute(query, (digest, user)).fetchone() for digest in digests)

    def add_xorb(self, digest: bytes, staged: Path, *, user: str | None = None) -> bool:
        """Verify the file `staged` and move it into the store, durably. False if that xorb was there already.

        `staged` must be on the same file system and is gone afterwards, whatever happens.
        Raises FormatError and its kinds if the bytes are not that xorb; OutOfSpace.
        """
        try:
            if self.has_xorb(digest) and self.holds(user, digest):
                return False
            with staged.open("r+b") as file:
                table = verify_xorb(file, digest)
                file.truncate(table.ends[-1])  # a footer, if one was sent, is of no use here
            with no_space_is_typed(self._folder):
                move_into_place(staged, self.xorb_path(digest))
            row = (digest, table.ends[-1], table.pack())
            with self._database.write() as connection:
                _note_holder(connection, user, [digest])
                return connection.execute("INSERT OR IGNORE INTO xorbs VALUES (?, ?, ?)", row).rowcount == 1
        finally:
            staged.unlink(missing_ok=True)

    def add_shard(self, data: bytes, *, user: str | None = None) -> int:
        """Verify a shard against the stored xorbs and register its files and its chunks, durably.

        Returns how many bytes of its files were not uploaded for it, because xorbs stored earlier hold them.
        Raises FormatError and its kinds, NotFound for a xorb that is not stored, OutOfSpace; then it registers nothing.
        """
        shard = parse_shard(data)
        tables = {digest: self.xorb_table(digest) for digest in _xorbs_of(shard)}
        if not self.holds(user, *tables):
            raise NotFound(
                "a xorb of this shard is not stored by this user; send it first (an empty HF_XET_CACHE does)"
            )
        for xorb in shard.xorbs:
            _verify_xorb_record(xorb, tables[xorb.hash])
        for file in shard.files:
            _verify_file_record(file, tables)
        with self._database.write() as connection:
            connection.executemany("INSERT OR IGNORE INTO files VALUES (?, ?, ?)", map(_file_row, shard.files))
            _note_holder(connection, user, [file.hash for file in shard.files])
            if shard.xorbs:
                _index(connection, shard)
        sent = sum(tables[xorb.hash].raw_offsets[-1] for xorb in shard.xorbs)
        return max(0, sum(total_size(file.segments) for file in shard.files) - sent)

    def dedup_shard(self, chunk: bytes, *, user: str | None = None) -> bytes:
        """A shard naming every xorb that was registered together with this chunk. Raises NotFound, also for a user
        who has not sent all of them: the answer would tell of what is in them.

        All of them, not only the one with the chunk: clients ask for one chunk in a thousand, so an answer of one xorb
        makes a client with a cold cache send 43 % of an unchanged 200 MB file again (measured); all of them, nothing.
        """
        with self._database.read() as connection:
            query = "SELECT xorbs FROM shards JOIN chunks ON shards.id = chunks.shard WHERE chunks.hash = ?"
            found = connection.execute(query, (chunk,)).fetchone()
            if found is None:
                raise NotFound(f"no stored file has the indexed chunk {to_text(chunk)}")
            digests = [digest for (digest,) in struct.iter_unpack("32s", found[0])]
            tables = [(digest, _xorb_table(connection, digest)) for digest in digests]
        if not self.holds(user, *digests):
            raise NotFound(f"no file of this user has the indexed chunk {to_text(chunk)}")
        return build_dedup_shard(((digest, table.ends[-1], table) for digest, table in tables), now=int(self._clock()))

    def segments(self, digest: bytes) -> tuple[Segment, ...]:
        """What a file is made of. Raises NotFound."""
        with self._database.read() as connection:
            found = connection.execute("SELECT segments FROM files WHERE hash = ?", (digest,)).fetchone()
        if found is None:
            raise NotFound(f"no file with hash {to_text(digest)} is stored")
        return tuple(Segment(xorb, length, first, last) for xorb, length, first, last in _SEGMENT.iter_unpack(found[0]))

    def read(self, reconstruction: Reconstruction) -> Iterator[bytes]:
        """The bytes it stands for, in pieces of at most one chunk. Raises Damaged where the disk changed them."""
        skip, left = reconstruction.skip, reconstruction.length
        for term in reconstruction.terms:
            with self.xorb_path(term.xorb).open("rb") as file:
                for chunk in read_chunks(file, self.xorb_table(term.xorb), term.first, term.last):
                    piece = chunk[skip : skip + left]
                    skip = 0
                    left -= len(piece)
                    yield piece


def total_size(segments: Sequence[Segment]) -> int:
    """The size in bytes of a file made of these segments."""
    return sum(segment.length for segment in segments)


def file_size(connection: sqlite3.Connection, digest: bytes) -> int | None:
    """The size in bytes of a registered file, or of the empty one; None if there is no such file."""
    if digest == EMPTY_FILE:
        return 0
    found = connection.execute("SELECT size FROM files WHERE hash = ?", (digest,)).fetchone()
    return None if found is None else int(found[0])


def _note_holder(connection: sqlite3.Connection, user: str | None, digests: Sequence[bytes]) -> None:
    if user is not None:
        rows = ((digest, user) for digest in digests)
        connection.executemany("INSERT OR IGNORE INTO holders VALUES (?, ?)", rows)


def _xorb_table(connection: sqlite3.Connection, digest: bytes) -> ChunkTable:
    found = connection.execute("SELECT chunks FROM xorbs WHERE hash = ?", (digest,)).fetchone()
    if found is None:
        raise NotFound(f"xorb {to_text(digest)} is not stored here; upload it first")
    return ChunkTable.unpack(found[0])


def _xorbs_of(shard: Shard) -> set[bytes]:
    return {xorb.hash for xorb in shard.xorbs} | {segment.xorb for file in shard.files for segment in file.segments}


def _verify_xorb_record(xorb: XorbRecord, table: ChunkTable) -> None:
    if xorb.chunks != tuple(zip(table.hashes, table.lengths, strict=True)):
        raise BadDigest(f"the shard's chunks of xorb {to_text(xorb.hash)} are not those that were uploaded")


def _verify_file_record(file: FileRecord, tables: dict[bytes, ChunkTable]) -> None:
    name = to_text(file.hash)
    chunks: list[tuple[bytes, int]] = []
    for number, segment in enumerate(file.segments):
        table = tables[segment.xorb]
        if not 0 <= segment.first < segment.last <= len(table.hashes):
            raise FormatError(f"segment {number} of file {name} names chunks that xorb {to_text(segment.xorb)} lacks")
        hashes = table.hashes[segment.first : segment.last]
        if table.raw_offsets[segment.last] - table.raw_offsets[segment.first] != segment.length:
            raise FormatError(f"segment {number} of file {name} has another length than its chunks")
        if file.verification and segment_hash(hashes) != file.verification[number]:
            raise BadDigest(f"segment {number} of file {name} fails its verification hash")
        chunks.extend(zip(hashes, table.lengths[segment.first : segment.last], strict=True))
    if file_hash(chunks) != file.hash:
        raise BadDigest(f"the chunks sent for file {name} do not hash to it")


def _index(connection: sqlite3.Connection, shard: Shard) -> None:
    """Remember the shard, and for each chunk a client may ask about, that this shard has it."""
    xorbs = b"".join(xorb.hash for xorb in shard.xorbs)
    number = connection.execute("INSERT INTO shards (xorbs) VALUES (?)", (xorbs,)).lastrowid
    openings = {(file.segments[0].xorb, file.segments[0].first) for file in shard.files if file.segments}
    connection.executemany(
        "INSERT OR REPLACE INTO chunks VALUES (?, ?)",
        (
            (digest, number)
            for xorb in shard.xorbs
            for at, (digest, _) in enumerate(xorb.chunks)
            if last_word(digest) % _INDEX_ONE_CHUNK_IN == 0 or at in xorb.flagged or (xorb.hash, at) in openings
        ),
    )


def _file_row(file: FileRecord) -> tuple[bytes, int, bytes]:
    packed = (_SEGMENT.pack(part.xorb, part.length, part.first, part.last) for part in file.segments)
    return file.hash, total_size(file.segments), b"".join(packed)
