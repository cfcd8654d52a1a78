"""Codec `dense`: one step per element, for a tensor that changed nearly everywhere or is tiny.

NAME.dense    zstd of the zigzag steps' byte planes: all lowest bytes, then all second bytes, …  (FORMAT.md §5.3)
"""

from collections.abc import Mapping

import numpy as np

from deltawire.errors import FormatError, Truncated
from deltawire.format.codecs.base import compress, decompress, store, unzigzag, zigzag
from deltawire.weights.bits import UInts, unsigned
from deltawire.weights.delta import TensorDelta, settle
from deltawire.weights.table import TensorSpec

SUFFIXES = ("dense",)


def encode(delta: TensorDelta, *, stored: bool = False) -> dict[str, UInts]:
    """One tensor's steps as byte streams; `stored` as they are, which takes no time to speak of."""
    if delta.positions is None:
        steps = delta.steps
    else:
        steps = np.zeros(delta.total, delta.steps.dtype)
        steps[delta.positions] = delta.steps
    planes = zigzag(steps).view(np.uint8).reshape(-1, steps.itemsize).T
    return {"dense": store(planes) if stored else compress(planes)}


def decode(streams: Mapping[str, UInts], spec: TensorSpec) -> TensorDelta:
    """The inverse of `encode`. Raises FormatError when the stream is not `spec`'s."""
    dtype = unsigned(spec.dtype)
    expected = spec.total * dtype.itemsize
    planes = decompress(streams["dense"], limit=expected, what=f"{spec.name}.dense")
    if planes.size != expected:
        raise Truncated(f"{spec.name}.dense: {planes.size} bytes of {expected}")
    folded = np.ascontiguousarray(planes.reshape(dtype.itemsize, -1).T).reshape(-1).view(dtype)
    delta = settle(spec.dtype, spec.shape, None, unzigzag(folded))
    if delta.changed != spec.changed:
        raise FormatError(f"{spec.name}: {delta.changed} elements change where the header says {spec.changed}")
    return delta
