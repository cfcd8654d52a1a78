"""A box of a tensor: its positions, bits, changes and digest are those that the whole tensor has there."""

from dataclasses import dataclass

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from deltawire.weights.bits import Bits
from deltawire.weights.boxes import Box
from deltawire.weights.delta import TensorDelta, between_bits
from deltawire.weights.digest import MODULUS, digest_bits


@dataclass(frozen=True)
class Rectangle:
    """A rectangle of shape `shape` that begins at `offset` in a tensor of shape `whole`."""

    whole: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def box(self):
        return Box.within(self.whole, self.offset, self.shape)

    def tensor(self, seed):
        data = np.random.default_rng(seed).integers(0, 1 << 16, int(np.prod(self.whole)), np.uint16)
        return Bits("BF16", self.whole, data)

    def numbers(self):
        """The whole tensor's flat positions that lie in the rectangle."""
        inside = tuple(slice(at, at + length) for at, length in zip(self.offset, self.shape, strict=True))
        return np.arange(int(np.prod(self.whole))).reshape(self.whole)[inside].reshape(-1)


@st.composite
def rectangles(draw):
    """A rectangle, perhaps empty, perhaps everything, of a tensor of up to three dimensions."""
    whole = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))
    offset = tuple(draw(st.integers(0, length)) for length in whole)
    shape = tuple(draw(st.integers(0, length - at)) for length, at in zip(whole, offset, strict=True))
    return Rectangle(whole, offset, shape)


@given(rectangles())
def test_positions_rise_and_are_those_of_the_whole_tensor(drawn):
    expected = drawn.numbers()
    assert drawn.box.positions(np.arange(expected.size)).tolist() == expected.tolist()


@given(rectangles())
def test_a_cut_is_a_copy_of_the_box(drawn):
    bits = drawn.tensor(1)
    cut = drawn.box.cut(bits)
    assert cut.shape == drawn.shape
    assert cut.data.tolist() == bits.data[drawn.numbers()].tolist()
    assert not np.shares_memory(cut.data, bits.data)


@given(rectangles(), st.sampled_from([0.0, 0.1, 1.0]))
def test_a_change_restricted_to_a_box_and_spread_again_is_what_changed_there(drawn, share_changed):
    old, new = drawn.tensor(1), drawn.tensor(1)
    moved = np.random.default_rng(2).random(new.data.size) < share_changed
    new.data[moved] += np.uint16(7)
    change = between_bits(old, new)
    for kept in (change, TensorDelta("BF16", drawn.whole, None, new.data - old.data)):
        spread = drawn.box.spread(drawn.box.restrict(kept), drawn.whole)
        positions, increments = spread.sparse()
        inside = drawn.numbers()[moved[drawn.numbers()]]
        assert spread.shape == drawn.whole
        assert (positions.tolist(), set(increments.tolist())) == (inside.tolist(), {7} if inside.size else set())


@given(rectangles())
def test_applying_a_change_moves_the_digest_as_digesting_again_would(drawn):
    box = drawn.box
    old, new = box.cut(drawn.tensor(1)), box.cut(drawn.tensor(2))
    change, before_all = between_bits(old, new), box.digest(old.data)
    before, after = box.apply_(old.data, change)
    assert old == new
    assert (before_all - before + after) % MODULUS == box.digest(new.data)


@given(rectangles(), rectangles())
def test_boxes_of_one_tensor_are_equal_once_joined_exactly_when_they_have_the_same_elements(one, other):
    if one.whole != other.whole or 0 in (one.box.size, other.box.size):
        return
    assert (one.box.joined == other.box.joined) == (one.numbers().tolist() == other.numbers().tolist())


@given(st.integers(0, 7), st.integers(0, 7))
def test_boxes_that_tile_a_tensor_have_digests_that_add_up_to_its_own(row, column):
    whole = (7, 7)
    bits = Rectangle(whole, (0, 0), whole).tensor(3)
    tiles = [
        Box.within(whole, (top, left), (bottom - top, right - left))
        for top, bottom in ((0, row), (row, 7))
        for left, right in ((0, column), (column, 7))
    ]
    assert sum(tile.digest(tile.cut(bits).data) for tile in tiles) % MODULUS == digest_bits(bits.data)
