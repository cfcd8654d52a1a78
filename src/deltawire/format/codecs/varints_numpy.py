"""The loops of codec `gap` in numpy, in chunks: what runs where Numba is not installed.

A reader finds every token of a chunk at once. Two facts allow it. A varint ends at its first byte below 128. A run of
bytes from 128 up starts at a token, so the first 255 in it is an escape, and the rest of the run belongs to its varint.
"""

import numpy as np

from deltawire.weights import speed
from deltawire.weights.bits import Positions, UInts

ESCAPE = 255
"""the gap byte that says: the rest follows as a varint"""
CHUNK = 1 << 15
"""positions or bytes at a time"""
LONGEST = 10
"""bytes of a varint of 64 bits"""


def write_gaps(positions: Positions, out: UInts) -> int:
    """Write the gap before each position to `out`, which has room for all; the bytes written."""
    speed.slow(positions.size)
    at, last = 0, -1
    for first in range(0, positions.size, CHUNK):
        part = positions[first : first + CHUNK]
        gaps = np.diff(part, prepend=last) - 1
        last = int(part[-1])
        escaped = gaps >= ESCAPE
        rest = (gaps[escaped] - ESCAPE).astype(np.uint64)
        sizes = np.ones(gaps.size, np.int64)
        sizes[escaped] += _sizes(rest)
        ends = at + np.cumsum(sizes)
        out[ends - sizes] = np.minimum(gaps, ESCAPE)
        _put(rest, ends[escaped] - sizes[escaped] + 1, sizes[escaped] - 1, out)
        at = int(ends[-1])
    return at


def read_gaps(data: UInts, total: int, positions: Positions) -> int:
    """Fill `positions`; the bytes consumed, or -1 when the stream is cut off or leaves the tensor."""
    speed.slow(positions.size)
    at, done, last = 0, 0, -1
    while done < positions.size:
        piece = data[at : at + CHUNK]
        starts, escapes, ends = _tokens(piece)
        starts = starts[: positions.size - done]
        if not starts.size:
            return -1
        escapes = escapes[escapes <= starts[-1]]
        more = _get(piece, escapes + 1, ends[: escapes.size])
        if more is None or (more >= np.uint64(total)).any():
            return -1
        gaps = piece[starts].astype(np.int64)
        gaps[np.searchsorted(starts, escapes)] += more.astype(np.int64)
        found = last + np.cumsum(gaps + 1)
        if (found >= total).any():
            return -1
        positions[done : done + starts.size] = found
        last, done = int(found[-1]), done + starts.size
        open_end = escapes.size and escapes[-1] == starts[-1]
        at += int(ends[escapes.size - 1] if open_end else starts[-1]) + 1
    return at


def _tokens(piece: UInts) -> tuple[Positions, Positions, Positions]:
    """Where tokens start in a piece that starts with one, which of them are escapes, and where those end (their last
    byte). A token that the piece's end cuts off is left out."""
    low = np.flatnonzero(piece < 128)
    full = np.flatnonzero(piece == ESCAPE)
    runs = np.searchsorted(low, full)
    first = np.diff(runs, prepend=-1) > 0
    escapes, runs = full[first], runs[first]
    size = piece.size
    if escapes.size and runs[-1] == low.size:
        size, escapes, runs = int(escapes[-1]), escapes[:-1], runs[:-1]
    ends = low[runs]
    inside = np.zeros(size + 1, np.int8)
    inside[escapes + 1] += 1
    inside[ends + 1] -= 1
    return np.flatnonzero(np.cumsum(inside[:size], dtype=np.int8) == 0), escapes, ends


def write_varints(values: UInts, out: UInts) -> int:
    """Write each value to `out`, which has room for all; the bytes written."""
    speed.slow(values.size)
    at = 0
    for first in range(0, values.size, CHUNK):
        part = values[first : first + CHUNK].astype(np.uint64)
        sizes = _sizes(part)
        ends = at + np.cumsum(sizes)
        _put(part, ends - sizes, sizes, out)
        at = int(ends[-1])
    return at


def read_varints(data: UInts, largest: np.uint64, values: UInts) -> int:
    """Fill `values`; the bytes consumed, or -1 when the stream is cut off, or a value is 0 or over `largest`."""
    speed.slow(values.size)
    at, done = 0, 0
    while done < values.size:
        piece = data[at : at + CHUNK]
        ends = np.flatnonzero(piece < 128)[: values.size - done]
        if not ends.size:
            return -1
        found = _get(piece, np.concatenate(([0], ends[:-1] + 1)), ends)
        if found is None or (found > largest).any() or (found == 0).any():
            return -1
        values[done : done + ends.size] = found
        done += ends.size
        at += int(ends[-1]) + 1
    return at


def _sizes(values: UInts) -> Positions:
    """How many bytes the varint of each value takes."""
    sizes = np.ones(values.size, np.int64)
    largest = int(values.max(initial=0))
    for shift in range(7, largest.bit_length(), 7):
        sizes += (values >> np.uint64(shift)) != 0
    return sizes


def _put(values: UInts, starts: Positions, sizes: Positions, out: UInts) -> None:
    """Write varints of these sizes at these places."""
    while values.size:
        out[starts] = (values & np.uint64(127)) | ((sizes > 1).astype(np.uint64) << np.uint64(7))
        longer = sizes > 1
        values, starts, sizes = values[longer] >> np.uint64(7), starts[longer] + 1, sizes[longer] - 1


def _get(data: UInts, starts: Positions, ends: Positions) -> UInts | None:
    """The varints whose first and last bytes stand there; None if one is too long or not the shortest form."""
    sizes, final = ends - starts + 1, data[ends]
    if ((sizes > LONGEST) | ((sizes == LONGEST) & (final > 1)) | ((sizes > 1) & (final == 0))).any():
        return None
    values = (data[starts] & np.uint8(127)).astype(np.uint64)
    for byte in range(1, int(sizes.max(initial=1))):
        longer = np.flatnonzero(sizes > byte)
        values[longer] |= (data[starts[longer] + byte] & np.uint8(127)).astype(np.uint64) << np.uint64(7 * byte)
    return values
