"""The barest compiled pass over two versions of the weights: it counts what differs. Others are shares of it."""

import numba

from deltawire.weights.bits import UInts


@numba.njit(nogil=True, cache=True, boundscheck=False, error_model="numpy")
def count_changed(old: UInts, new: UInts) -> int:
    """How many elements of two equally long arrays differ."""
    found = 0
    for i in range(old.size):
        found += old[i] != new[i]
    return found
