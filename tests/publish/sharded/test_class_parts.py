"""A rank encodes what it holds by class: its tiles end where its part does, and where receivers' parts do."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import random_bits

from deltawire.format import delta_file
from deltawire.format.codecs import fused, tiles
from deltawire.publish.choice import SUBSET, Choice
from deltawire.publish.sharded.shards import placed
from deltawire.runlog.cuts import pattern
from deltawire.weights.blocks import block_of, cut_of, part_of
from deltawire.weights.boxes import Box
from deltawire.weights.delta import Delta, between_bits

SMALL = {"LEAST": 8, "TARGET": 128, "STEP": 2}
"""what the writer of tests keeps to, for tensors of a few hundred elements"""


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(tiles, name, value)


def parts(shape, dim, size, chunk=None):
    """What each of so many processes holds: `chunk` of a dimension, the last perhaps less, or nothing."""
    chunk = chunk or -(-shape[dim] // size)
    found = []
    for rank in range(size):
        start, stop = (min(at * chunk, shape[dim]) for at in (rank, rank + 1))
        box = Box.within(
            shape,
            tuple(start if axis == dim else 0 for axis in range(len(shape))),
            tuple(stop - start if axis == dim else length for axis, length in enumerate(shape)),
        )
        found.append(box)
    return found


def write(old, new, box, choice):
    """A rank's file, as it is written when the version is captured: its own change, counted in its box."""
    before, after = box.cut(old), box.cut(new)
    coding = choice.coding_of("w.0", old.shape, box)
    coded = {}
    if coding is None:
        change = between_bits(before, after)
    else:
        change, own = fused.compare(before, after, by_class=True, tile=coding.tile)
        coded = {"w": placed(own, box, old.shape)}
    delta = Delta({"w": box.spread(change, old.shape)}) if change.changed else Delta()
    return delta_file.encode(delta, codec="class", coded={name: coded[name] for name in delta if name in coded})


@settings(max_examples=80)
@given(
    st.integers(0, 1 << 32),
    st.sampled_from([(48, 32), (31, 8), (6, 16, 32), (96,), (40, 64), (3,)]),
    st.integers(2, 4),
    st.integers(1, 4),
    st.data(),
)
def test_the_files_of_all_ranks_add_up_and_each_receiver_reads_its_part_of_each(seed, shape, ranks, receivers, data):
    rng = np.random.default_rng(seed)
    old = random_bits(rng, "BF16", shape)
    new = old.copy()
    new.data[rng.random(old.data.size) < data.draw(st.sampled_from([0.02, 0.3]))] += np.uint16(1)
    owned = parts(shape, data.draw(st.integers(0, len(shape) - 1)), ranks)
    held = parts(shape, data.draw(st.integers(0, len(shape) - 1)), receivers)
    rows, columns = tiles.matrix(shape)
    cut = cut_of([block_of(box, columns) for box in held if box.size], rows, columns)
    choice = Choice(by_class=True, cuts={pattern("w.0"): cut})
    files = [delta_file.open_file(write(old, new, box, choice)) for box in owned]
    whole = between_bits(old, new)
    assert sum((file.decode({"w": old}) for file in files), Delta()) == Delta({"w": whole})
    for box in held:
        mine = part_of(placed_alone(old, box), [box], columns)
        found = Delta()
        for file in files:
            if "w" in file:
                found += Delta({"w": file.tensor("w", mine if file.needs else None)})
        wanted = box.restrict(whole)
        assert box.restrict(found["w"]) == wanted if "w" in found else not wanted.changed


def placed_alone(bits, box):
    """The bits of a tensor in a box, and zeros elsewhere."""
    alone = type(bits)(bits.dtype, bits.shape, np.zeros_like(bits.data))
    here = box.positions(np.arange(box.size))
    alone.data[here] = bits.data[here]
    return alone


def test_rows_of_four_ranks_and_columns_of_two_receivers_make_tiles_of_both():
    choice = Choice(by_class=True, cuts={"w.*": (0, 32)})
    for box in parts((64, 64), 0, 4):
        assert choice.coding_of("w.0", (64, 64), box).tile == (8, 32)
    assert Choice(by_class=True).coding_of("w.0", (64, 64), Box.all_of((64, 64))).tile == (2, 64)


ROWS = Box.within((64, 64), (16, 0), (16, 64))


@pytest.mark.parametrize(
    ("choice", "box", "shape"),
    [
        (SUBSET, ROWS, (64, 64)),
        (Choice(by_class=True, cuts={"w.*": (3, 1)}), ROWS, (64, 64)),
        (Choice(by_class=True), Box.within((64, 64), (0, 0), (0, 64)), (64, 64)),
        (Choice(by_class=True), Box.within((64, 6), (1, 0), (1, 6)), (64, 6)),
    ],
    ids=["as the run says", "receivers that no tiles suit", "an empty part", "a row of 6"],
)
def test_what_no_tiles_suit_is_left_to_subset(choice, box, shape):
    assert choice.coding_of("w.0", shape, box) is None


@pytest.mark.parametrize(("ranks", "tile"), list(product((2, 4), [(4, 32), (2, 16)])))
def test_tiles_of_a_part_stand_where_the_tensor_has_them(ranks, tile):
    shape = (6, 16, 32)
    old = random_bits(np.random.default_rng(ranks), "BF16", shape)
    new = old.copy()
    new.data[::5] += np.uint16(1)
    for box in parts(shape, 1, ranks):
        _, own = fused.compare(box.cut(old), box.cut(new), by_class=True, tile=tile)
        block = block_of(box, 32)
        for at, entry in zip(tiles.grid(shape, tile), placed(own, box, shape).entries, strict=True):
            inside = block.shared_with(at.row, at.column, at.rows, at.width)
            assert inside in (0, at.size)
            assert (entry.nbytes > 0) == (inside > 0)
