"""Codec `dense`: one step per element, for a tensor that changed nearly everywhere or is tiny.

NAME.dense    zstd of the zigzag steps' byte planes: all lowest bytes, then all second bytes, …  (FORMAT.md §5.3)
"""

from collections.abc import Mapping

import numpy as np

from deltawire.errors import FormatError, Truncated
from deltawire.format.codecs.base import compress, decompress, store, unzigzag, zigzag
from deltawire.weights.bits import UInts, unsigned
from deltawire.weights.delta import TensorDelta, settle
from deltawire.weights.kept import Kept
from deltawire.weights.table import TensorSpec

SUFFIXES = ("dense",)
_AT_ONCE = 1 << 20
"""elements that are counted at a time"""


def encode(delta: TensorDelta, *, stored: bool = False) -> dict[str, UInts]:
    """One tensor's steps as byte streams; `stored` as they are, which takes no time to speak of."""
    if delta.positions is None:
        steps = delta.steps
    else:
        steps = np.zeros(delta.total, delta.steps.dtype)
        steps[delta.positions] = delta.steps
    planes = zigzag(steps).view(np.uint8).reshape(-1, steps.itemsize).T
    return {"dense": store(planes) if stored else compress(planes)}


def decode(streams: Mapping[str, UInts], spec: TensorSpec, kept: Kept | None = None) -> TensorDelta:
    """The inverse of `encode`; of what is `kept` of the tensor alone, where that is given. Raises FormatError when the
    stream is not `spec`'s."""
    dtype = unsigned(spec.dtype)
    expected = spec.total * dtype.itemsize
    planes = decompress(streams["dense"], limit=expected, what=f"{spec.name}.dense")
    if planes.size != expected:
        raise Truncated(f"{spec.name}.dense: {planes.size} bytes of {expected}")
    planes = planes.reshape(dtype.itemsize, -1)
    if kept is not None:
        _require_changed(spec, _changed(planes))
        return settle(spec.dtype, (kept.size,), None, _steps(np.stack([kept.pick(plane) for plane in planes]), dtype))
    delta = settle(spec.dtype, spec.shape, None, _steps(planes, dtype))
    _require_changed(spec, delta.changed)
    return delta


def _steps(planes: UInts, dtype: np.dtype[np.unsignedinteger]) -> UInts:
    return unzigzag(np.ascontiguousarray(planes.T).reshape(-1).view(dtype))


def _changed(planes: UInts) -> int:
    """How many elements have a step other than 0."""
    parts = (planes[:, start : start + _AT_ONCE] for start in range(0, planes.shape[1], _AT_ONCE))
    return sum(int(np.count_nonzero(np.bitwise_or.reduce(part, axis=0))) for part in parts)


def _require_changed(spec: TensorSpec, changed: int) -> None:
    if changed != spec.changed:
        raise FormatError(f"{spec.name}: {changed} elements change where the header says {spec.changed}")
