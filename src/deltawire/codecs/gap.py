"""Codec `gap` (the default; needs no base): positions as byte gaps and steps as zigzag varints, both through zstd-1.

    NAME.gaps     zstd of, per change, the number of unchanged elements before it: one byte below 255, or the byte 255
                  and the rest as a varint                                                          (FORMAT.md §5.2)
    NAME.steps    zstd of, per change, zigzag(step) as a varint

A varint is LEB128: seven bits a byte, lowest first, the top bit set on all but the last byte.
"""

from collections.abc import Mapping

import numba
import numpy as np

from deltawire.bits import Positions, UInts, unsigned
from deltawire.codecs.base import TensorSpec, compress, decompress, unzigzag, zigzag
from deltawire.delta import TensorDelta
from deltawire.errors import FormatError

SUFFIXES = ("gaps", "steps")
ESCAPE = 255
LONGEST_GAP = 1 + 10
LONGEST_STEP = {1: 2, 2: 3, 4: 5, 8: 10}
"""Bytes of the longest varint, by element width."""

_jit = numba.njit(nogil=True, cache=True, error_model="numpy")


@_jit
def _put_varint(out, at, value):  # type: ignore[no-untyped-def]
    while value >= np.uint64(128):
        out[at] = np.uint8(value & np.uint64(127)) | np.uint8(128)
        value >>= np.uint64(7)
        at += 1
    out[at] = np.uint8(value)
    return at + 1


@_jit
def _get_varint(data, at):  # type: ignore[no-untyped-def]
    """(value, next offset); next offset is -1 for a varint that is cut off, too long, or not the shortest form."""
    value = np.uint64(0)
    shift = np.uint64(0)
    while at < data.size and shift <= np.uint64(63):
        byte = np.uint64(data[at])
        at += 1
        if shift == np.uint64(63) and byte > np.uint64(1):
            return value, -1
        value |= (byte & np.uint64(127)) << shift
        if byte < np.uint64(128):
            return value, at if byte != 0 or shift == np.uint64(0) else -1
        shift += np.uint64(7)
    return value, -1


@_jit
def _write_gaps(positions, out):  # type: ignore[no-untyped-def]
    at = 0
    last = np.int64(-1)
    for k in range(positions.size):
        gap = positions[k] - last - 1
        last = positions[k]
        if gap < ESCAPE:
            out[at] = np.uint8(gap)
            at += 1
        else:
            out[at] = np.uint8(ESCAPE)
            at = _put_varint(out, at + 1, np.uint64(gap - ESCAPE))
    return at


@_jit
def _read_gaps(data, total, positions):  # type: ignore[no-untyped-def]
    """Fills `positions`; the bytes consumed, or -1 when the stream is cut off or leaves the tensor."""
    at = 0
    last = np.int64(-1)
    for k in range(positions.size):
        if at >= data.size:
            return -1
        gap = np.int64(data[at])
        at += 1
        if gap == ESCAPE:
            more, at = _get_varint(data, at)
            if at < 0 or more >= np.uint64(total):
                return -1
            gap += np.int64(more)
        last += gap + 1
        if last >= total:
            return -1
        positions[k] = last
    return at


@_jit
def _write_varints(values, out):  # type: ignore[no-untyped-def]
    at = 0
    for k in range(values.size):
        at = _put_varint(out, at, np.uint64(values[k]))
    return at


@_jit
def _read_varints(data, largest, values):  # type: ignore[no-untyped-def]
    at = 0
    for k in range(values.size):
        value, at = _get_varint(data, at)
        if at < 0 or value > largest or value == np.uint64(0):
            return -1
        values[k] = value
    return at


def encode(delta: TensorDelta) -> dict[str, UInts]:
    """One tensor's change as byte streams."""
    positions, steps = delta.sparse()
    gaps = np.empty(_gap_bytes(positions, delta.total), np.uint8)
    gaps = gaps[: _write_gaps(positions, gaps)]
    varints = np.empty(LONGEST_STEP[steps.itemsize] * steps.size, np.uint8)
    varints = varints[: _write_varints(zigzag(steps), varints)]
    return {"gaps": compress(gaps), "steps": compress(varints)}


def _gap_bytes(positions: Positions, total: int) -> int:
    """An upper bound: a byte per change, and a varint where the gap is long; at most total/255 gaps are."""
    return int(positions.size + (LONGEST_GAP - 1) * min(positions.size, total // ESCAPE))


def decode(streams: Mapping[str, UInts], spec: TensorSpec) -> TensorDelta:
    """The inverse of `encode`. Raises FormatError when the streams are not `spec`'s; nothing out of range survives."""
    dtype = unsigned(spec.dtype)
    changed, width = spec.changed, dtype.itemsize
    gaps = decompress(streams["gaps"], limit=LONGEST_GAP * changed, what=f"{spec.name}.gaps")
    varints = decompress(streams["steps"], limit=LONGEST_STEP[width] * changed, what=f"{spec.name}.steps")
    if min(gaps.size, varints.size) < changed:
        raise FormatError(f"{spec.name}: streams too short for {changed} changes")
    positions, folded = np.empty(changed, np.int64), np.empty(changed, dtype)
    if _read_gaps(gaps, spec.total, positions) != gaps.size:
        raise FormatError(f"{spec.name}.gaps: not {changed} positions within {spec.total} elements")
    if _read_varints(varints, np.uint64(np.iinfo(dtype).max), folded) != varints.size:
        raise FormatError(f"{spec.name}.steps: not {changed} non-zero steps of {8 * width} bits")
    return TensorDelta(spec.dtype, spec.shape, positions, unzigzag(folded))


def warm_up() -> None:
    """Compile the loops for every element width."""
    for dtype in ("U8", "BF16", "F32", "F64"):
        steps = np.ones(1, unsigned(dtype))
        delta = TensorDelta(dtype, (2,), np.ones(1, np.int64), steps)
        decode(encode(delta), TensorSpec("warm-up", dtype, (2,), 1))
