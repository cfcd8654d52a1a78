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


@numba.njit(nogil=True, cache=True, boundscheck=False, error_model="numpy")
def count_often(old: UInts, new: UInts, times: int) -> int:
    """The same, so many times over."""
    found = 0
    for _ in range(times):
        found += count_changed(old, new)
        old[0] += 1  # so that no compiler does it once
    return found
