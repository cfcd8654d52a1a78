"""Tiles that suit receivers which hold parts of tensors: each decodes its own, and no cut makes too many of them."""

import numpy as np
import pytest
import reference
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import random_bits

from deltawire.errors import NeedsBase
from deltawire.format import delta_file
from deltawire.format.codecs import fused, subset, tiles, twins
from deltawire.weights.bits import Bits, count
from deltawire.weights.blocks import block_of, cut_of, part_of
from deltawire.weights.boxes import Box
from deltawire.weights.delta import Delta, between_bits

SIZES = st.integers(1, 1 << 20)


@pytest.fixture
def small(monkeypatch):
    """Tiles of at least 16 elements where there are at least 2^18."""
    monkeypatch.setattr(tiles, "LEAST", 16)
    monkeypatch.setattr(tiles, "TARGET", 256)
    monkeypatch.setattr(tiles, "STEP", 2)


def test_tiles_follow_the_axis_that_receivers_cut_and_are_as_large_as_others():
    assert tiles.choose_within((4096, 4096), (0, 0)) == tiles.choose((4096, 4096)) == (1024, 4096)
    assert tiles.choose_within((4096, 4096), (2048, 0)) == (2048, 4096)
    assert tiles.choose_within((4096, 4096), (0, 2048)) == (4096, 2048)
    assert tiles.choose_within((4096, 4096), (512, 0)) == (512, 4096)
    assert tiles.choose_within((4096, 4096), (0, 512)) == (4096, 512)
    assert tiles.choose_within((151936, 1024), (75968, 0)) == (4748, 1024)
    assert tiles.choose_within((50257, 768), (25152, 0)) == (8384, 768)
    assert tiles.choose_within((128, 768, 2048), (0, 1024)) == (4096, 1024)
    assert tiles.choose_within((1 << 25,), (0, 1 << 24)) == (1, 1 << 23)


@pytest.mark.parametrize(
    ("shape", "cut"),
    [
        ((4096, 1024), (128, 0)),  # 2^17 elements
        ((4096, 4096), (0, 2080 + 1)),  # not a multiple of 64 columns
        ((4096, 4096), (1, 1)),
        ((1024, 64), (512, 0)),
        ((1 << 20, 4096), (1 << 5, 0)),  # 2^17, too
    ],
)
def test_where_tiles_would_be_too_small_or_too_narrow_there_are_none(shape, cut):
    assert tiles.choose_within(shape, cut) is None


@given(st.lists(SIZES, min_size=1, max_size=3).map(tuple), st.tuples(st.integers(0, 1 << 50), st.integers(0, 1 << 50)))
def test_whatever_a_stranger_says_tiles_divide_it_and_are_few(shape, cut):
    tile = tiles.choose_within(shape, cut)
    if tile is None:
        return
    rows, columns = tiles.matrix(shape)
    assert all(1 <= size <= most for size, most in zip(tile, (rows, columns), strict=True))
    for size, edge, whole in zip(tile, cut, (rows, columns), strict=True):
        assert not 0 < edge < whole or edge % size == 0
    assert tile[1] == columns or tile[1] % tiles.STEP == 0
    assert tiles.tiles_in(shape, tile) <= 32 * tiles.MOST
    assert tile[0] * tile[1] >= min(tiles.LEAST, count(shape))


@st.composite
def sliced(draw):
    """Two versions of a tensor, and the part of it that each of a few workers holds along one of its dimensions."""
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    shape = draw(st.sampled_from([(48, 32), (6, 16, 32), (96,), (40, 64)]))
    old = random_bits(rng, draw(st.sampled_from(["BF16", "F32", "F8_E4M3"])), shape)
    new = old.copy()
    where = rng.random(old.data.size) < draw(st.sampled_from([0.005, 0.1, 0.7]))
    new.data[where] += new.data.dtype.type(1)
    dim = draw(st.integers(0, len(shape) - 1))
    workers = draw(st.sampled_from([size for size in (2, 3, 4) if shape[dim] % size == 0]))
    length = shape[dim] // workers
    lengths = tuple(length if axis == dim else size for axis, size in enumerate(shape))
    offsets = [tuple(rank * length if axis == dim else 0 for axis in range(len(shape))) for rank in range(workers)]
    return old, new, [Box.within(shape, offset, lengths) for offset in offsets]


@settings(max_examples=60)
@given(sliced())
def test_each_worker_reads_its_part_of_a_change_from_its_part_of_the_weights(case):
    old, new, boxes = case
    rows, columns = tiles.matrix(old.shape)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("LEAST", 4), ("TARGET", 64), ("STEP", 2)):
            patch.setattr(tiles, name, value)
        cut = cut_of([block_of(box, columns) for box in boxes], rows, columns)
        tile = tiles.choose_within(old.shape, cut)
    assume(tile is not None)
    delta, coded = fused.compare(old, new, by_class=True, tile=tile)
    assert delta == between_bits(old, new)
    assume(delta.changed)
    assert coded.payload.tobytes() == subset.encode(delta, old.data, tile=tile, twin=twins.plain).payload.tobytes()
    data = delta_file.encode(Delta({"w": delta}), codec="class", coded={"w": coded})
    assert delta_file.decode(data, base={"w": old})["w"] == delta
    file = delta_file.open_file(data)
    assume("w" in file.needs)  # else it is dense
    for box in boxes:
        mine = np.zeros(old.data.size, old.data.dtype)
        here = box.positions(np.arange(box.size))
        mine[here] = old.data[here]
        part = part_of(Bits(old.dtype, old.shape, mine), [box], columns)
        found = file.tensor("w", part)
        assert box.restrict(found) == box.restrict(delta)
        assert found.changed == box.restrict(delta).changed


def test_a_worker_without_any_of_a_tensor_reads_no_change_and_one_with_a_part_of_a_tile_is_told():
    old = random_bits(np.random.default_rng(0), "BF16", (64, 32))
    new = old.copy()
    new.data[::50] += 1
    change, coded = fused.compare(old, new, by_class=True, tile=(32, 32))
    file = delta_file.open_file(delta_file.encode(Delta({"w": change}), codec="class", coded={"w": coded}))
    assert file.tensor("w", part_of(old, [], 32)).changed == 0
    for box in (Box(0, (31 * 32,), (1,)), Box(0, (64, 16), (32, 2))):
        with pytest.raises(NeedsBase, match="of a tile this worker holds a part"):
            file.tensor("w", part_of(old, [box], 32))


def test_the_independent_reader_reads_tiles_side_by_side():
    old = random_bits(np.random.default_rng(1), "BF16", (10, 130))
    new = old.copy()
    new.data[::7] += 1
    change, coded = fused.compare(old, new, by_class=True, tile=(4, 64))
    assert len(coded.entries) == 9
    data = delta_file.encode(Delta({"w": change}), codec="class", coded={"w": coded})
    _, _, steps = reference.delta(data, {"w": old.data.tolist()})["w"]
    assert sorted(steps) == change.sparse()[0].tolist()


@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize("tile", [(200, 1), (7, 1), (1, 1), (200, 3), (64, 2)])
def test_a_reader_takes_tiles_as_narrow_as_a_writer_may_make_them(tile, by_class):
    rng = np.random.default_rng(0)
    old = Bits("BF16", (200, 5), rng.integers(0x3800, 0x3D80, 1000).astype(np.uint16))
    new = old.copy()
    new.data[rng.random(1000) < 0.5] += np.uint16(3)
    change, coded = fused.compare(old, new, by_class=by_class, tile=tile)
    assert change == between_bits(old, new)
    slow = subset.encode(change, old.data if by_class else None, tile=tile, twin=twins.plain)
    assert (coded.payload.tobytes(), [entry.lists for entry in coded.entries]) == (
        slow.payload.tobytes(), [entry.lists for entry in slow.entries]
    )  # fmt: skip
    file = delta_file.encode(Delta({"w": change}), codec="class" if by_class else "subset", coded={"w": coded})
    assert delta_file.decode(file, base={"w": old})["w"] == change
