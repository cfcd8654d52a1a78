"""The directory of a delta file: which tensors change, and what belongs to each in the payload. FORMAT.md §5.5

All that a reader must know before it decodes anything stands here, in one zstd frame: names, dtypes, shapes, tiles,
and the counts from which the length of every list in the payload follows.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from deltawire.errors import FormatError, TooLarge, Truncated
from deltawire.format.codecs import tiles
from deltawire.format.codecs.base import compress, decompress
from deltawire.format.codecs.classes import CLASSES, SCHEMES
from deltawire.format.codecs.lists import MAX_K, ClassLists
from deltawire.format.codecs.subset import NOTHING, TileEntry
from deltawire.format.container import MAX_RANK
from deltawire.weights.bits import WIDTHS, UInts
from deltawire.weights.table import TensorSpec

DTYPES = tuple(WIDTHS)
"""a dtype's code is its place here"""
ENCODINGS = ("dense", "subset", "class")
"""and an encoding's its place here"""
MAX_DIRECTORY = 64 << 20
"""bytes of its content"""
MAX_TILES = 1 << 20
"""tiles in a file"""
MAX_COUNT = 1 << 48
"""elements of one tensor"""
LEVEL = 3
INVERTED = 0x80
"""beside k: the unchanged elements are listed"""


@dataclass(frozen=True, slots=True, eq=False)
class Listed:
    """One changed tensor: its facts, its encoding, the rows and columns of its tiles, and an entry a tile. A `dense`
    tensor has one entry, of which only the bytes of its frame count."""

    spec: TensorSpec
    encoding: str
    tile: tuple[int, int]
    entries: tuple[TileEntry, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the payload."""
        return sum(entry.nbytes for entry in self.entries)


def write(listed: Iterable[Listed]) -> UInts:
    """The frame, as uint8. Raises TooLarge for one that no reader takes."""
    tensors = list(listed)
    if sum(len(tensor.entries) for tensor in tensors if tensor.encoding != "dense") > MAX_TILES:
        raise TooLarge(f"more than {MAX_TILES:,} tiles for one file")
    out = bytearray()
    _put(out, len(tensors))
    for tensor in tensors:
        name = tensor.spec.name.encode()
        _put(out, len(name))
        out += name
    for tensor in tensors:
        out += bytes([DTYPES.index(tensor.spec.dtype), ENCODINGS.index(tensor.encoding)])
        numbers = (len(tensor.spec.shape), *tensor.spec.shape, *(() if tensor.encoding == "dense" else tensor.tile))
        for number in numbers:
            _put(out, number)
    for tensor in tensors:
        if tensor.encoding == "dense":
            _put(out, tensor.nbytes)
            _put(out, tensor.spec.changed)
        else:
            for entry in tensor.entries:
                _put_entry(out, entry, 8 * WIDTHS[tensor.spec.dtype])
    if len(out) > MAX_DIRECTORY:
        raise TooLarge(f"a directory of {len(out):,} bytes for one file, where {MAX_DIRECTORY:,} are the most")
    return compress(np.frombuffer(bytes(out), np.uint8), level=LEVEL)


def read(frame: UInts, *, codec: str, payload: int) -> list[Listed]:
    """The inverse of `write`, for a file of `codec` whose payload has so many bytes.

    Raises FormatError for anything that no writer writes; memory is spent only as the payload has bits.
    """
    reader = _Reader(decompress(frame, limit=MAX_DIRECTORY, what="directory").tobytes())
    tensors = reader.number(payload)  # each has a byte there: what changes cannot be said in none
    names = [reader.text(reader.number(MAX_DIRECTORY)) for _ in range(tensors)]
    if any(name >= later for name, later in pairwise(names)):
        raise FormatError("the directory's names are not in ascending order")
    facts = [_read_facts(reader, name, codec) for name in names]
    budget = _Budget(payload, MAX_TILES)
    listed = [_read_entries(reader, budget, fact) for fact in facts]
    if reader.at != len(reader.data) or budget.bytes:
        raise FormatError("the directory does not end with its last tensor, or the payload with that")
    return listed


def _put(out: bytearray, value: int) -> None:
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)


def _put_entry(out: bytearray, entry: TileEntry, bits: int) -> None:
    _put(out, entry.nbytes)
    if not entry.nbytes:
        return
    _put(out, entry.dead)
    out += sum(1 << row.number for row in entry.lists).to_bytes(2, "little")
    for _, changed, written, k, inverted, ladder in entry.lists:
        out.append(k | INVERTED if inverted else k)
        numbers = (changed, written, *ladder) if inverted else (changed, *ladder)
        if max(numbers) < 128:
            out += bytes(numbers)
        else:
            for number in numbers:
                _put(out, number)
        if len(ladder) < bits - 1:
            out.append(0)


class _Reader:
    """Numbers out of bytes that nobody vouches for."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def byte(self) -> int:
        at = self.at
        self.at = at + 1
        try:
            return self.data[at]
        except IndexError:
            raise Truncated("the directory ends inside an entry") from None

    def number(self, most: int) -> int:
        """A varint in its shortest form, at most `most`."""
        value = self.byte()
        if value >= 128:
            value = self._longer(value)
        if value > most:
            raise FormatError(f"{value:,} in the directory, where at most {most:,} can be")
        return value

    def _longer(self, byte: int) -> int:
        """A varint of several bytes, from the first of them on."""
        value, shift = byte & 127, 0
        while byte >= 128 and shift < 56:
            byte, shift = self.byte(), shift + 7
            value |= (byte & 127) << shift
        if byte >= 128 or byte == 0:
            raise FormatError("a number in the directory is not in its shortest form")
        return value

    def text(self, length: int) -> str:
        if length > len(self.data) - self.at:
            raise Truncated("the directory ends inside a name")
        self.at += length
        try:
            return self.data[self.at - length : self.at].decode()
        except UnicodeDecodeError:
            raise FormatError("a name in the directory is not UTF-8") from None


@dataclass(slots=True)
class _Budget:
    """What of the payload, and of the tiles a file may have, is not spoken for."""

    bytes: int
    tiles: int

    def take(self, nbytes: int) -> int:
        self.bytes -= nbytes
        return nbytes


class _Facts(NamedTuple):
    """What the directory says of a tensor before its entries."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    encoding: str
    tile: tuple[int, int]


def _read_facts(reader: _Reader, name: str, codec: str) -> _Facts:
    dtype, code = reader.byte(), reader.byte()
    if dtype >= len(DTYPES) or code >= len(ENCODINGS):
        raise FormatError(f"{name}: a dtype or an encoding that this format does not have")
    encoding = ENCODINGS[code]
    if encoding == "class" and (codec != "class" or DTYPES[dtype] not in SCHEMES):
        raise FormatError(f"{name}: {DTYPES[dtype]} encoded by class in a file of codec {codec!r}")
    shape = tuple(reader.number(MAX_COUNT - 1) for _ in range(reader.number(MAX_RANK)))
    rows, columns = tiles.matrix(shape)
    if not 0 < rows * columns < MAX_COUNT:
        raise FormatError(f"{name}: no tensor of shape {list(shape)} can change")
    tile = (0, 0) if encoding == "dense" else (reader.number(rows), reader.number(columns))
    if encoding != "dense" and not min(tile):
        raise FormatError(f"{name}: tiles of {tile[0]} rows and {tile[1]} columns")
    return _Facts(name, DTYPES[dtype], shape, encoding, tile)


def _read_entries(reader: _Reader, budget: _Budget, facts: _Facts) -> Listed:
    name, dtype, shape, encoding, tile = facts
    rows, columns = tiles.matrix(shape)
    try:
        if encoding == "dense":
            entries: tuple[TileEntry, ...] = (TileEntry(budget.take(reader.number(budget.bytes)), 0, ()),)
            changed = reader.number(rows * columns)
        else:
            budget.tiles -= tiles.tiles_in(shape, tile)
            if budget.tiles < 0:
                raise FormatError(f"more than {MAX_TILES:,} tiles in a file")
            classes, bits = CLASSES if encoding == "class" else 1, 8 * WIDTHS[dtype]
            entries = tuple(_read_entry(reader, budget, part, classes, bits) for part in tiles.grid(shape, tile))
            changed = sum(entry.changed for entry in entries)
    except FormatError as error:
        raise type(error)(f"{name}: {error}") from None
    if not changed:
        raise FormatError(f"{name}: listed, but nothing changes")
    return Listed(TensorSpec(name, dtype, shape, changed), encoding, tile, entries)


def _read_entry(reader: _Reader, budget: _Budget, tile: tiles.Tile, classes: int, bits: int) -> TileEntry:
    nbytes = budget.take(reader.number(budget.bytes))
    if not nbytes:
        return NOTHING
    dead = reader.number(tile.rows - 1)
    present = reader.byte() | reader.byte() << 8
    if not 0 < present < 1 << classes:
        raise FormatError(f"classes {present:#06x} of a tile that has {classes}")
    left, fixed = (tile.rows - dead) * tile.width, 0
    lists = []
    for number in _ones(present):
        row = _read_class(reader, number, left, bits)
        left -= row.changed + (row.written if row.inverted else 0)
        fixed += row.changed + sum(row.ladder[1:])
        lists.append(row)
    if fixed > 8 * nbytes:
        raise FormatError("a tile lists more changes than its payload has bits")
    return TileEntry(nbytes, dead, tuple(lists))


def _read_class(reader: _Reader, number: int, left: int, bits: int) -> ClassLists:
    """The lists of one class, of which at most `left` elements can be."""
    head = reader.byte()
    k, inverted = head & ~INVERTED, head >= INVERTED
    changed = reader.number(left)
    if k > MAX_K or not changed:
        raise FormatError(f"k {k} and {changed} changes of class {number}")
    written = reader.number(min(left - changed, changed - 1)) if inverted else changed
    ladder: list[int] = []
    while len(ladder) < bits - 1 and (chosen := reader.number(ladder[-1] if ladder else changed)):
        ladder.append(chosen)
    return ClassLists(number, changed, written, k, inverted, tuple(ladder))


def _ones(value: int) -> Iterator[int]:
    return (bit for bit in range(value.bit_length()) if value >> bit & 1)
