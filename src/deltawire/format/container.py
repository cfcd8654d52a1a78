"""The safetensors container: a JSON header and bytes, written deterministically and read without trusting either.

Ours rather than the safetensors package's, for three things that package does not do. The header's order is fixed, for
a file's name is its hash; bf16 and fp8 come back as bits without torch; and reading copies nothing. Its own `safe_open`
reads what this writes; a test says so.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltawire.errors import FormatError, TooLarge, Truncated
from deltawire.weights.bits import WIDTHS, Bits, UInts, count, unsigned

MAX_HEADER = 100_000_000
"""bytes; the safetensors format's own bound against parser bombs"""
MAX_RANK = 64
"""numpy's own; without a bound, multiplying a hostile shape out takes minutes"""
ALIGN = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor in a container: its dtype, shape, and the half-open byte range after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed and checked header: metadata strings, entries by name, and where the data begins in the file."""

    metadata: dict[str, str]
    entries: dict[str, Entry]
    data_start: int


def write(tensors: Mapping[str, Bits], metadata: Mapping[str, str]) -> bytearray:
    """A whole container, tensors in the order given; equal input gives equal bytes."""
    out = bytearray(header_bytes({name: (bits.dtype, bits.shape) for name, bits in tensors.items()}, metadata))
    for bits in tensors.values():
        out += bits.data.view(np.uint8).data
    return out


def header_bytes(layout: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The length and the JSON header of a container whose tensors (name -> dtype, shape) follow in that order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in layout.items():
        stop = offset + count(shape) * WIDTHS[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGN)
    return len(text).to_bytes(8, "little") + text


def read_header(data: bytes | bytearray | memoryview | np.ndarray, *, limit: int = MAX_HEADER) -> Header:
    """Parse and check the header of a container held (or memory-mapped) as bytes.

    Raises Truncated when bytes are missing, TooLarge for a header beyond `limit`. Raises FormatError unless the tensors
    of the header cover the data exactly, in bounds, without holes or overlaps.
    """
    view = _bytes(data)
    if len(view) < 8:
        raise Truncated(f"{len(view)} bytes are not a safetensors file")
    length = int.from_bytes(view[:8], "little")
    if length > limit:
        raise TooLarge(f"a header of {length:,} bytes; the bound is {limit:,}")
    if 8 + length > len(view):
        raise Truncated(f"the header says {length:,} bytes, {len(view) - 8:,} follow")
    raw = _parse_json(bytes(view[8 : 8 + length]))
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError("__metadata__ is not a map of strings")
    entries = {name: _entry(name, value) for name, value in raw.items()}
    _check_cover(entries, len(view) - 8 - length)
    return Header(metadata, entries, 8 + length)


def tensor(data: bytes | bytearray | memoryview | np.ndarray, header: Header, name: str) -> Bits:
    """One tensor's bits, sharing the file's memory."""
    entry = header.entries[name]
    view = _bytes(data)[header.data_start + entry.start : header.data_start + entry.stop]
    bits: UInts = np.frombuffer(view, unsigned(entry.dtype)) if len(view) else np.empty(0, unsigned(entry.dtype))
    return Bits(entry.dtype, entry.shape, bits)


def _bytes(data: bytes | bytearray | memoryview | np.ndarray) -> memoryview:
    return memoryview(data.data if isinstance(data, np.ndarray) else data).cast("B")


def _parse_json(text: bytes) -> dict[str, Any]:
    def refuse_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) != len(pairs):
            raise FormatError("a name stands twice in the header")
        return mapping

    try:
        raw = json.loads(text.decode(), object_pairs_hook=refuse_twins)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the header is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise FormatError("the header is not a JSON object")
    return raw


def _entry(name: str, value: Any) -> Entry:
    try:
        dtype, shape, (start, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise FormatError(f"{name}: not a tensor entry (dtype, shape, data_offsets)") from None
    numbers = (*shape, start, stop)
    if not isinstance(dtype, str) or dtype not in WIDTHS or len(shape) > MAX_RANK:
        raise FormatError(f"{name}: unknown dtype, or more than {MAX_RANK} dimensions")
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
        raise FormatError(f"{name}: shape or data_offsets out of range")
    if stop - start != count(shape) * WIDTHS[dtype]:
        raise FormatError(f"{name}: {stop - start} bytes do not hold {dtype} of shape {list(shape)}")
    return Entry(dtype, shape, start, stop)


def _check_cover(entries: Mapping[str, Entry], size: int) -> None:
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise FormatError(f"{name}: starts at byte {entry.start} where {end} was due (a hole or an overlap)")
        end = entry.stop
    if end > size:
        raise Truncated(f"the tensors need {end:,} bytes, the file has {size:,}")
    if end < size:
        raise FormatError(f"{size - end:,} bytes belong to no tensor")
