"""A delta of three tensors, one changed here and there, one everywhere, one not: what tests of delta files share."""

import numpy as np

from deltawire.weights.bits import Bits
from deltawire.weights.delta import Delta

OLD = {
    "a": Bits("BF16", (100, 3), np.arange(300, dtype=np.uint16)),
    "b": Bits("F32", (8,), np.arange(8, dtype=np.uint32)),
    "same": Bits("F32", (), np.zeros(1, np.uint32)),
}
NEW = {name: bits.copy() for name, bits in OLD.items()}
NEW["a"].data[[0, 9, 299]] += 1
NEW["b"].data[:] -= 1
DELTA = Delta.between(OLD, NEW)
