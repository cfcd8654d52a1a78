"""The workers of a host fetch each byte once, and each takes memory for its own part and one tensor."""

import pytest
from host_workers import SHAPE, measure

from deltawire.weights.digest import MODULUS

ALLOWANCE = 40 << 20
"""bytes that a worker takes whatever the size of the model: a download's buffers, tables, what the allocator keeps"""


def require_small(said):
    """A change of every weight of a slice is its increments, what it replaces and what replaces that; then there is a
    tensor. The change of a hundredth takes less, and what an allocator keeps of the one before it is counted."""
    largest = 2 * SHAPE[0] * SHAPE[1]
    for worker in said:
        for version in worker:
            assert version["taken"] <= 3 * version["held"] + largest + ALLOWANCE


def test_two_of_eight_workers_fetch_once_and_take_memory_for_their_own_parts(tmp_path):
    sent, said, _ = measure(8, (0, 5), 8, tmp_path)
    assert sent == 1.0
    require_small(said)


@pytest.mark.nightly
def test_eight_workers_fetch_once_take_memory_for_their_own_parts_and_hold_the_model_together(tmp_path):
    sent, said, promised = measure(48, range(8), 8, tmp_path)
    assert sent == 1.0
    require_small(said)
    for version, digests in enumerate(promised):
        for name, value in digests.items():
            assert sum(int(worker[version]["digests"][name], 16) for worker in said) % MODULUS == value
