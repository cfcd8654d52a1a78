"""What a worker holds of a matrix, as blocks: how much of a rectangle is in them, and where their edges are."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from deltawire.weights.bits import Bits, zeros
from deltawire.weights.blocks import FINEST, WHOLE, block_of, cut_of, part_of, together
from deltawire.weights.boxes import Box


@st.composite
def boxes(draw):
    """A tensor's shape, and a box of it in any of its dimensions, perhaps with every second element of one."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    box = []
    for length in shape:
        start = draw(st.integers(0, length - 1))
        step = draw(st.sampled_from([1, 1, 1, 2]))
        box.append((start, max(1, draw(st.integers(1, length - start)) // step), step))
    strides = [int(np.prod(shape[dim + 1 :])) for dim in range(len(shape))]
    offset = sum(start * stride for (start, _, _), stride in zip(box, strides, strict=True))
    lengths = tuple(length for _, length, _ in box)
    return shape, Box(offset, lengths, tuple(s * step for s, (_, _, step) in zip(strides, box, strict=True)))


def mask_of(shape, box):
    mask = np.zeros(int(np.prod(shape)), bool)
    mask[box.positions(np.arange(box.size))] = True
    return mask.reshape(-1, shape[-1])


@given(boxes(), st.data())
def test_a_box_of_any_dimensions_is_a_block_that_knows_what_of_a_rectangle_it_holds(case, data):
    shape, box = case
    mask = mask_of(shape, box)
    rows, columns = mask.shape
    block = block_of(box, columns)
    if block is None:  # nothing can be said of every second column
        assert box.strides[-1] == 2 or box.joined.strides[-1] not in (1, *(columns * k for k in range(1, rows + 1)))
        return
    assert block.size == box.size
    row, column = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    height, width = data.draw(st.integers(1, rows - row)), data.draw(st.integers(1, columns - column))
    part = part_of(zeros("U8", shape), [box], columns)
    for found in (block.shared_with(row, column, height, width), part.held_of(row, column, height, width)):
        assert found == mask[row : row + height, column : column + width].sum()


@given(boxes())
def test_tiles_that_divide_a_cut_lie_in_the_block_or_outside_it(case):
    shape, box = case
    mask = mask_of(shape, box)
    rows, columns = mask.shape
    block = block_of(box, columns)
    if block is None:
        return
    cut = cut_of([block], rows, columns)
    height, width = cut[0] or rows, cut[1] or columns
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            tile = mask[row : row + height, column : column + width]
            assert tile.all() or not tile.any()


def test_a_cut_is_as_coarse_as_can_be_and_one_for_all_is_the_largest_that_suits_all():
    halves = [block_of(Box(at * 64 * 32, (64 * 32,), (1,)), 32) for at in range(2)]
    assert cut_of(halves, 128, 32) == (64, 0)
    assert cut_of([block_of(Box(16, (128, 16), (32, 1)), 32)], 128, 32) == (0, 16)
    assert cut_of([block_of(Box(0, (50 * 32,), (1,)), 32)], 50, 32) == WHOLE
    assert cut_of([block_of(Box(0, (26 * 32,), (1,)), 32)], 51, 32) == (26, 0)  # a vocabulary that is padded to 52
    assert cut_of([], 128, 32) == WHOLE
    assert together((64, 0), (96, 16)) == (32, 16)
    assert together(WHOLE, (7, 0)) == (7, 0)
    assert together(FINEST, (64, 64)) == FINEST


def test_a_part_of_a_tensor_that_is_no_block_says_so_and_a_copy_stays_a_part():
    whole = Bits("U8", (4, 4), np.arange(16, dtype=np.uint8))
    part = part_of(whole, [Box(0, (4, 2), (4, 2))], 4)
    assert (part.blocks, part.held_of(0, 0, 4, 4)) == (None, None)
    copied = part_of(whole, [Box(0, (8,), (1,))], 4).copy()
    copied.data[0] = 99
    assert (copied.held_of(0, 0, 4, 4), whole.data[0]) == (8, 0)
