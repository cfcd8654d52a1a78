"""What is kept of a tensor: a change of it is the whole change, seen at those elements alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_boxes import Rectangle

from deltawire.errors import NeedsBase
from deltawire.format import delta_file
from deltawire.format.codecs import dense, fused, subset, tiles
from deltawire.read.adding import Part, add_up
from deltawire.weights.bits import Bits
from deltawire.weights.blocks import PartBits
from deltawire.weights.boxes import Box
from deltawire.weights.delta import Delta, TensorDelta, between_bits
from deltawire.weights.kept import Kept

SHARES = st.sampled_from([0.0, 0.02, 0.3, 1.0])


@st.composite
def keeping(draw):
    """Up to three rectangles of one tensor, which may be equal or overlap, and that tensor's bits at four versions."""
    whole = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    rectangles = []
    for _ in range(draw(st.integers(1, 3))):
        offset = tuple(draw(st.integers(0, length - 1)) for length in whole)
        shape = tuple(draw(st.integers(1, length - at)) for length, at in zip(whole, offset, strict=True))
        rectangles.append(Rectangle(whole, offset, shape))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    versions = [Bits("BF16", whole, rng.integers(0, 1 << 16, int(np.prod(whole)), np.uint16))]
    for _ in range(3):
        after = versions[-1].copy()
        after.data[rng.random(after.data.size) < draw(SHARES)] += np.uint16(1)
        versions.append(after)
    unique = list({rectangle.box.joined: rectangle for rectangle in rectangles}.values())
    return Kept(whole, [rectangle.box for rectangle in rectangles]), versions, [one.numbers() for one in unique]


@given(keeping())
def test_a_change_is_cut_split_and_spread_as_walking_its_elements_says(case):
    kept, (old, new, *_), numbers = case
    change = between_bits(old, new)
    every = np.concatenate(numbers)
    assert kept.size == every.size
    assert np.array_equal(kept.pick(old.data), old.data[every])
    cut = kept.cut(change)
    assert cut == between_bits(*(Bits("BF16", (every.size,), bits.data[every]) for bits in (old, new)))
    for own, part in zip(numbers, kept.split(cut).values(), strict=True):
        assert np.array_equal(old.data[own] + _dense(part), new.data[own])
    moved = old.data.copy()
    kept.spread(cut).apply_(moved)
    assert np.array_equal(moved[every], new.data[every])
    others = np.setdiff1d(np.arange(old.data.size), every)
    assert np.array_equal(moved[others], old.data[others])


@given(keeping(), st.data())
def test_no_rectangle_with_something_kept_in_it_is_passed_over(case, data):
    kept, versions, numbers = case
    rows, columns = tiles.matrix(versions[0].shape)
    tile = data.draw(st.integers(1, rows)), data.draw(st.integers(1, columns))
    every = np.concatenate(numbers)
    for part in tiles.grid(versions[0].shape, tile):
        inside = np.isin(every, part.outside(np.arange(part.size))).any()
        assert kept.meets(part.row, part.column, part.rows, part.width) or not inside


@given(keeping(), st.sampled_from(["gap", "raw", "subset", "class"]), st.integers(1, 4))
def test_a_file_gives_what_is_kept_of_a_tensor_in_every_codec(case, codec, width):
    kept, (old, new, *_), _ = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TARGET", 8 * width)
        file = delta_file.open_file(memoryview(_file(old, new, codec)))
        change = between_bits(old, new)
        assert file.tensor("w", old, kept) == kept.cut(change) if change.changed else "w" not in file


@given(keeping(), st.lists(st.sampled_from(["gap", "subset", "class", "held"]), min_size=3, max_size=3))
def test_several_files_add_up_to_what_is_kept_of_them_together(case, codecs):
    """Also where a later one ranks what an earlier one changed beside what is kept."""
    kept, versions, numbers = case
    every, parts = np.concatenate(numbers), []
    for number, codec in enumerate(codecs):
        old, new = versions[number : number + 2]
        if codec == "held":
            parts.append(Part(str(number), known=Delta({"w": kept.cut(between_bits(old, new))})))
        else:
            parts.append(Part(str(number), (delta_file.open_file(_file(old, new, codec)),)))
    expected = between_bits(*(Bits("BF16", (every.size,), versions[at].data[every]) for at in (0, -1)))
    try:
        found, decoded = add_up(parts, {"w": versions[0]}, {"w": kept})
    except NeedsBase:
        assert "held" in codecs[: [*codecs, "class"][::-1].index("class") + 3]
        return
    assert found.get("w", _nothing(kept)) == expected
    for where, change in decoded.items():
        old, new = versions[int(where) : int(where) + 2]
        assert change.get("w", _nothing(kept)) == kept.cut(between_bits(old, new))


def test_a_tensor_of_which_nothing_is_kept_and_a_tile_without_anything_kept_are_not_decoded(monkeypatch):
    rng = np.random.default_rng(0)
    old = Bits("BF16", (64, 32), rng.integers(0, 1 << 16, 64 * 32, np.uint16))
    new = Bits("BF16", (64, 32), old.data + (rng.random(64 * 32) < 0.1).astype(np.uint16))
    coded = fused.compare(old, new, by_class=False, tile=(16, 32))[1]
    delta = Delta({"w": between_bits(old, new), "x": between_bits(old, new)})
    file = delta_file.open_file(delta_file.encode(delta, coded={"w": coded, "x": coded}))
    decoded, done = [], subset.decode_tile
    monkeypatch.setattr(subset, "decode_tile", lambda job, twin: decoded.append(job) or done(job, twin))
    kept = Kept((64, 32), [Box(16 * 32, (16 * 32,), (1,))])
    found, _ = add_up([Part("1", (file,))], None, {"w": kept})
    assert [(job.spec.name, job.tile.row) for job in decoded] == [("w", 16)]
    assert (found["w"], [*found]) == (kept.cut(delta["w"]), ["w"])


def test_after_a_change_of_what_is_kept_a_delta_that_is_read_against_more_is_refused():
    rng = np.random.default_rng(0)
    versions = [Bits("BF16", (8, 8), rng.integers(0, 1 << 16, 64, np.uint16))]
    for _ in range(2):
        versions.append(Bits("BF16", (8, 8), versions[-1].data + (rng.random(64) < 0.3).astype(np.uint16)))
    kept = Kept((8, 8), [Box(0, (8, 4), (8, 1))])
    assert isinstance(kept.among(versions[0]), PartBits)
    assert kept.among(versions[0]).data is versions[0].data
    held = Part("held", known=Delta({"w": kept.cut(between_bits(*versions[:2]))}))
    read = Part("read", (delta_file.open_file(_file(*versions[1:], "class")),))
    with pytest.raises(NeedsBase, match="of a tile this worker holds a part"):
        add_up([held, read], {"w": versions[0]}, {"w": kept})


@pytest.mark.parametrize("changed", [1, 5])
def test_a_dense_tensor_that_changes_otherwise_than_its_header_says_is_refused_whatever_is_kept(changed):
    old = Bits("BF16", (3, 4), np.zeros(12, np.uint16))
    new = Bits("BF16", (3, 4), np.arange(12, dtype=np.uint16))
    change = between_bits(old, new)
    spec = delta_file.read_header(_file(old, new, "gap")).tensors[0]
    wrong = type(spec)(spec.name, spec.dtype, spec.shape, changed)
    with pytest.raises(delta_file.FormatError, match="11 elements change where the header says"):
        dense.decode(dense.encode(change), wrong, Kept((3, 4), [Box(0, (2,), (1,))]))


def _file(old: Bits, new: Bits, codec: str) -> bytes:
    return delta_file.encode(Delta({"w": between_bits(old, new)}), codec=codec, base={"w": old})


def _dense(change: TensorDelta) -> np.ndarray:
    found = np.zeros(change.total, change.increments.dtype)
    positions, increments = change.sparse()
    found[positions] = increments
    return found


def _nothing(kept: Kept) -> TensorDelta:
    return TensorDelta("BF16", (kept.size,), np.empty(0, np.int64), np.empty(0, np.uint16))
