"""Codec `raw`: flat positions and absolute new values, the layout of TRL's post, for interchange and import.

    NAME.indices  int32, or int64 from 2^31 elements on: sorted, unique            (FORMAT.md §5.1)
    NAME.values   the new values, in the tensor's own dtype

Six bytes per changed bf16 element. Values are absolute, so both ways need the old weights.
"""

from collections.abc import Mapping

import numpy as np

from deltawire.errors import FormatError
from deltawire.weights.bits import Bits, UInts
from deltawire.weights.delta import TensorDelta, settle
from deltawire.weights.table import TensorSpec

SUFFIXES = ("indices", "values")


def encode(delta: TensorDelta, old: Bits) -> dict[str, np.ndarray]:
    """One tensor's change as positions and new values; `old` is the tensor before it."""
    positions, steps = delta.sparse()
    index = np.int32 if delta.total <= np.iinfo(np.int32).max else np.int64
    return {"indices": positions.astype(index), "values": old.data[positions] + steps}


def decode(streams: Mapping[str, np.ndarray], spec: TensorSpec, old: Bits) -> TensorDelta:
    """The change from `old` to the values in the streams. Raises FormatError for positions that are unsorted, doubled
    or out of range. A listed value that equals the old one is no change."""
    positions = streams["indices"].astype(np.int64)
    values: UInts = streams["values"].view(old.data.dtype)
    if positions.size != values.size:
        raise FormatError(f"{spec.name}: {positions.size} indices but {values.size} values")
    in_range = not positions.size or (positions[0] >= 0 and positions[-1] < old.data.size)
    if not (in_range and (positions[1:] > positions[:-1]).all()):  # compared, not subtracted: differences can wrap
        raise FormatError(f"{spec.name}.indices: not sorted and unique within {old.data.size} elements")
    return settle(old.dtype, old.shape, positions, values - old.data[positions])
