"""A packed weight: its order is learned from numbers, and every rectangle of it is found again."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from locating import located

from deltawire.live.boxes import LiveBox
from deltawire.live.layouts import fit


def packed(shape, blocks):
    """Where each element of an (experts, rows, columns) weight goes when rows come in blocks, columns first."""
    experts, rows, columns = shape
    before = np.arange(np.prod(shape)).reshape(experts, rows // blocks, blocks, columns)
    order = before.transpose(0, 1, 3, 2).reshape(-1)
    targets = np.empty_like(order)
    targets[order] = np.arange(order.size)
    return targets


@given(
    experts=st.integers(1, 3),
    count=st.integers(1, 3),
    block=st.sampled_from([1, 2, 4, 16]),
    columns=st.integers(1, 7),
    data=st.data(),
)
def test_every_rectangle_of_a_packed_weight_is_found_where_it_went(experts, count, block, columns, data):
    rows = count * block
    targets = packed((experts, rows, columns), block)
    layout = fit(targets)
    assert layout is not None
    assert [layout.offset(before) for before in range(targets.size)] == targets.tolist()

    expert = data.draw(st.integers(0, experts - 1))
    first = data.draw(st.integers(0, rows - 1))
    height = data.draw(st.integers(1, rows - first))
    left = data.draw(st.integers(0, columns - 1))
    width = data.draw(st.integers(1, columns - left))
    step = data.draw(st.integers(1, 3))
    taken = (height + step - 1) // step
    dims = [(taken, width, columns * step), (width, 1, 1)]
    kept = [dim for dim in dims if dim[0] != 1]
    start = (expert * rows + first) * columns + left
    box = LiveBox(
        tuple(dim[0] for dim in kept), 5, tuple(dim[1] for dim in kept), "w", start, tuple(dim[2] for dim in kept)
    )
    boxes = layout.carry(box)
    if boxes is None:
        assert step > 1
        return
    wanted = {
        5 + row * width + column: int(targets[start + row * step * columns + column])
        for row in range(taken)
        for column in range(width)
    }
    found = {}
    positions = np.arange(5, 5 + taken * width)
    for part in boxes:
        inside, offsets = located(part, positions)
        assert not set(positions[inside]) & found.keys()
        found |= dict(zip(positions[inside].tolist(), offsets.tolist(), strict=True))
    assert found == wanted


@pytest.mark.parametrize("order", [[0, 2, 1, 3, 5, 4], [3, 1, 0, 2, 7, 4, 6, 5]])
def test_an_order_that_digits_do_not_explain_is_not_fitted(order):
    assert fit(np.array(order)) is None


def test_halves_that_changed_places_are_one_box_each_and_a_long_reversal_is_not_fitted():
    layout = fit(np.array([4, 5, 6, 7, 0, 1, 2, 3]))
    first, second = layout.carry(LiveBox((8,), 0, (1,), "w", 0, (1,)))
    assert (first.target_offset, second.target_offset) == (4, 0)
    assert fit(np.arange(100)[::-1]) is None


def test_one_element_and_none():
    assert fit(np.array([7])).offset(0) == 7
    assert fit(np.array([], np.int64)).digits == ()
