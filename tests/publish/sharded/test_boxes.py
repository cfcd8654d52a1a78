"""A box of a tensor: its positions, bits, changes and digest are those that the whole tensor has there."""

from itertools import pairwise, product

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltawire.prepare.names import View
from deltawire.publish.sharded.boxes import Box, Shard, share
from deltawire.weights.bits import Bits
from deltawire.weights.delta import TensorDelta, between_bits
from deltawire.weights.digest import digest_bits
from deltawire.weights.tensors import as_bits

MODULUS = 1 << 64


@st.composite
def boxes(draw):
    """A box, perhaps empty, perhaps everything, of a tensor of up to three dimensions."""
    whole = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))
    offset = tuple(draw(st.integers(0, length)) for length in whole)
    shape = tuple(draw(st.integers(0, length - at)) for length, at in zip(whole, offset, strict=True))
    return Box(whole, offset, shape)


def slices(box):
    return tuple(slice(at, at + length) for at, length in zip(box.offset, box.shape, strict=True))


def tensor(box, seed):
    data = np.random.default_rng(seed).integers(0, 1 << 16, int(np.prod(box.whole)), np.uint16)
    return Bits("BF16", box.whole, data)


def numbers(box):
    """The whole tensor's flat positions that lie in the box."""
    return np.arange(int(np.prod(box.whole))).reshape(box.whole)[slices(box)].reshape(-1)


@given(boxes())
def test_positions_rise_and_are_those_of_the_whole_tensor(box):
    expected = numbers(box)
    assert box.positions(np.arange(expected.size)).tolist() == expected.tolist()


@given(boxes())
def test_a_cut_is_a_copy_of_the_box(box):
    bits = tensor(box, 1)
    cut = box.cut(bits)
    assert cut.shape == box.shape
    assert cut.data.tolist() == bits.data[numbers(box)].tolist()
    assert not np.shares_memory(cut.data, bits.data)


@given(boxes(), st.sampled_from([0.0, 0.1, 1.0]))
def test_a_change_restricted_to_a_box_and_spread_again_is_what_changed_there(box, share_changed):
    old, new = tensor(box, 1), tensor(box, 1)
    moved = np.random.default_rng(2).random(new.data.size) < share_changed
    new.data[moved] += np.uint16(7)
    change = between_bits(old, new)
    for kept in (change, TensorDelta("BF16", box.whole, None, new.data - old.data)):
        spread = box.spread(box.restrict(kept))
        positions, steps = spread.sparse()
        inside = numbers(box)[moved[numbers(box)]]
        assert spread.shape == box.whole
        assert (positions.tolist(), set(steps.tolist())) == (inside.tolist(), {7} if inside.size else set())


@given(boxes())
def test_applying_a_change_moves_the_digest_as_digesting_again_would(box):
    old, new = box.cut(tensor(box, 1)), box.cut(tensor(box, 2))
    change, before_all = between_bits(old, new), box.digest(old.data)
    before, after = box.apply_(old.data, change)
    assert old == new
    assert (before_all - before + after) % MODULUS == box.digest(new.data)


@st.composite
def views(draw):
    """A view with at least one dimension, perhaps turned, of a tensor of up to four dimensions, and the boxes of some
    ranks that together hold each of its elements once; some boxes may be empty."""
    whole = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    box = tuple(tuple(sorted(draw(st.tuples(*[st.integers(0, length)] * 2)))) for length in whole)
    thin = [dim for dim, (start, stop) in enumerate(box) if stop - start == 1]
    dropped = draw(st.sets(st.sampled_from(thin), max_size=len(whole) - 1)) if thin else set()
    dims = draw(st.permutations([dim for dim in range(len(whole)) if dim not in dropped]))
    cuts = [sorted([0, length, *draw(st.lists(st.integers(0, length), max_size=2))]) for length in whole]
    ranks = [
        Box(whole, tuple(start for start, _ in ends), tuple(stop - start for start, stop in ends))
        for ends in product(*(pairwise(cut) for cut in cuts))
    ]
    return View("w", box, tuple(dims)), ranks


@given(views(), st.sampled_from([np.asarray, torch.from_numpy]))
def test_what_all_ranks_hold_of_a_view_is_the_view_once_and_in_the_memory_of_their_shards(drawn, make):
    view, ranks = drawn
    whole = np.random.default_rng(5).normal(size=ranks[0].whole).astype(np.float32)
    right, digest = as_bits(view.of(whole)), 0
    found, times = np.zeros_like(right.data), np.zeros(right.data.size, int)
    for box in ranks:
        held = make(whole[slices(box)].copy())
        part = Shard(box, held, owned=True, copies=3).through(view)
        bits = as_bits(part.tensor)
        assert (part.box.whole, part.box.shape, part.owned, part.copies) == (right.shape, bits.shape, True, 3)
        assert not bits.data.size or np.shares_memory(np.asarray(part.tensor), np.asarray(held))
        assert bits == part.box.cut(right)
        places = part.box.positions(np.arange(bits.data.size))
        found[places], digest = bits.data, digest + part.box.digest(bits.data)
        times[places] += 1
    assert (times == 1).all()
    assert found.tolist() == right.data.tolist()
    assert digest % MODULUS == digest_bits(right.data)


@given(st.integers(0, 7), st.integers(0, 7))
def test_boxes_that_tile_a_tensor_have_digests_that_add_up_to_its_own(row, column):
    whole = (7, 7)
    bits = tensor(Box.all_of(whole), 3)
    tiles = [
        Box(whole, (top, left), (bottom - top, right - left))
        for top, bottom in ((0, row), (row, 7))
        for left, right in ((0, column), (column, 7))
    ]
    assert sum(tile.digest(tile.cut(bits).data) for tile in tiles) % MODULUS == digest_bits(bits.data)


@given(st.integers(0, 40), st.integers(1, 6))
def test_shares_of_all_ranks_add_up_to_the_digest(elements, ranks):
    data = np.random.default_rng(4).integers(0, 1 << 16, elements, np.uint16)
    assert sum(share(data, rank, ranks) for rank in range(ranks)) % MODULUS == digest_bits(data)
