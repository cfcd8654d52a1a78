"""The loops of codec `gap` in Numba. `varints_numpy` has each as a numpy twin; `varints` chooses."""

import numba
import numpy as np

from deltawire.format.codecs.varints_numpy import ESCAPE

_jit = numba.njit(nogil=True, cache=True, error_model="numpy")


@_jit
def _put(out, at, value):  # type: ignore[no-untyped-def]
    while value >= np.uint64(128):
        out[at] = np.uint8(value & np.uint64(127)) | np.uint8(128)
        value >>= np.uint64(7)
        at += 1
    out[at] = np.uint8(value)
    return at + 1


@_jit
def _get(data, at):  # type: ignore[no-untyped-def]
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
def write_gaps(positions, out):  # type: ignore[no-untyped-def]
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
            at = _put(out, at + 1, np.uint64(gap - ESCAPE))
    return at


@_jit
def read_gaps(data, total, positions):  # type: ignore[no-untyped-def]
    """Fills `positions`; the bytes consumed, or -1 when the stream is cut off or leaves the tensor."""
    at = 0
    last = np.int64(-1)
    for k in range(positions.size):
        if at >= data.size:
            return -1
        gap = np.int64(data[at])
        at += 1
        if gap == ESCAPE:
            more, at = _get(data, at)
            if at < 0 or more >= np.uint64(total):
                return -1
            gap += np.int64(more)
        last += gap + 1
        if last >= total:
            return -1
        positions[k] = last
    return at


@_jit
def write_varints(values, out):  # type: ignore[no-untyped-def]
    at = 0
    for k in range(values.size):
        at = _put(out, at, np.uint64(values[k]))
    return at


@_jit
def read_varints(data, largest, values):  # type: ignore[no-untyped-def]
    at = 0
    for k in range(values.size):
        value, at = _get(data, at)
        if at < 0 or value > largest or value == np.uint64(0):
            return -1
        values[k] = value
    return at
