"""Codec `gap` (needs no base): positions as byte gaps and steps as zigzag varints, both through zstd-1.

    NAME.gaps     zstd of, per change, the number of unchanged elements before it: one byte below 255, or the byte 255
                  and the rest as a varint                                                          (FORMAT.md §5.2)
    NAME.steps    zstd of, per change, zigzag(step) as a varint

A varint is LEB128: seven bits a byte, lowest first, the top bit set on all but the last byte.
"""

from collections.abc import Mapping

import numpy as np

from deltawire.errors import FormatError
from deltawire.format.codecs.base import compress, decompress, unzigzag, zigzag
from deltawire.weights.bits import Positions, UInts, unsigned
from deltawire.weights.delta import TensorDelta
from deltawire.weights.table import TensorSpec

SUFFIXES = ("gaps", "steps")
ESCAPE = 255
LONGEST_GAP = 1 + 10
LONGEST_STEP = {1: 2, 2: 3, 4: 5, 8: 10}
"""Bytes of the longest varint, by element width."""


def encode(delta: TensorDelta) -> dict[str, UInts]:
    """One tensor's change as byte streams."""
    from deltawire.format.codecs import varints

    positions, steps = delta.sparse()
    gaps = np.empty(_gap_bytes(positions, delta.total), np.uint8)
    gaps = gaps[: varints.write_gaps(positions, gaps)]
    packed = np.empty(LONGEST_STEP[steps.itemsize] * steps.size, np.uint8)
    packed = packed[: varints.write_varints(zigzag(steps), packed)]
    return {"gaps": compress(gaps), "steps": compress(packed)}


def _gap_bytes(positions: Positions, total: int) -> int:
    """An upper bound: a byte per change, and a varint where the gap is long; at most total/255 gaps are."""
    return int(positions.size + (LONGEST_GAP - 1) * min(positions.size, total // ESCAPE))


def decode(streams: Mapping[str, UInts], spec: TensorSpec) -> TensorDelta:
    """The inverse of `encode`. Raises FormatError when the streams are not `spec`'s; nothing out of range survives."""
    from deltawire.format.codecs import varints

    dtype = unsigned(spec.dtype)
    changed, width = spec.changed, dtype.itemsize
    gaps = decompress(streams["gaps"], limit=LONGEST_GAP * changed, what=f"{spec.name}.gaps")
    packed = decompress(streams["steps"], limit=LONGEST_STEP[width] * changed, what=f"{spec.name}.steps")
    if min(gaps.size, packed.size) < changed:
        raise FormatError(f"{spec.name}: streams too short for {changed} changes")
    positions, folded = np.empty(changed, np.int64), np.empty(changed, dtype)
    if varints.read_gaps(gaps, spec.total, positions) != gaps.size:
        raise FormatError(f"{spec.name}.gaps: not {changed} positions within {spec.total} elements")
    if varints.read_varints(packed, np.uint64(np.iinfo(dtype).max), folded) != packed.size:
        raise FormatError(f"{spec.name}.steps: not {changed} non-zero steps of {8 * width} bits")
    return TensorDelta(spec.dtype, spec.shape, positions, unzigzag(folded))


def warm_up() -> None:
    """Compile the loops for every element width."""
    for dtype in ("U8", "BF16", "F32", "F64"):
        steps = np.ones(1, unsigned(dtype))
        delta = TensorDelta(dtype, (2,), np.ones(1, np.int64), steps)
        decode(encode(delta), TensorSpec("warm-up", dtype, (2,), 1))
