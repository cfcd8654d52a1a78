"""Codecs subset and class: every change comes back, three twins write the same bytes, and no bits lead out of range."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import changed, every_dtype_far_apart, pairs, random_bits, seeds

from deltawire.errors import FormatError, WrongBase
from deltawire.format.codecs import subset, tiles, twins
from deltawire.format.codecs.classes import SCHEMES
from deltawire.format.codecs.lists import Changes, plan
from deltawire.format.codecs.subset import Coded, TileEntry
from deltawire.weights.bits import WIDTHS, Bits, unsigned
from deltawire.weights.delta import Delta, TensorDelta, between_bits
from deltawire.weights.table import TensorSpec

FAST, PLAIN, TORCH = twins.fast(), twins.plain, twins.on_torch()
EVERY = pytest.mark.parametrize("twin", [PLAIN, FAST, TORCH], ids=["numpy", "numba", "torch"])


def spec_of(delta: TensorDelta) -> TensorSpec:
    return TensorSpec("w", delta.dtype, delta.shape, delta.changed)


def same(one: Coded, other: Coded) -> bool:
    assert one.payload.tobytes() == other.payload.tobytes()
    entries = [[(entry.nbytes, entry.dead, entry.lists) for entry in coded.entries] for coded in (one, other)]
    return one.tile == other.tile and entries[0] == entries[1]


@st.composite
def tiled(draw: st.DrawFn) -> tuple[Bits, TensorDelta, tuple[int, int] | None]:
    """A tensor, a change of it in some of its rows, and the tiles to cut it into."""
    old, new = draw(pairs())
    rows, columns = tiles.matrix(old.shape)
    if rows > 1 and columns and draw(st.booleans()):
        idle = np.random.default_rng(draw(seeds)).random(rows) < 0.7
        new.data.reshape(rows, columns)[idle] = old.data.reshape(rows, columns)[idle]
    tile = draw(st.none() | st.tuples(st.integers(1, 9), st.integers(1, 99)))
    return old, between_bits(old, new), tile


def check(case: tuple[Bits, TensorDelta, tuple[int, int] | None], twin: twins.Twin) -> None:
    old, delta, tile = case
    if not delta.changed:
        return
    for base in (None, old.data):
        coded = subset.encode(delta, base, tile=tile, twin=twin)
        assert same(coded, subset.encode(delta, base, tile=tile, twin=PLAIN))
        assert subset.decode(coded, spec_of(delta), base, twin=twin) == delta


@given(tiled())
def test_every_change_comes_back_and_numba_writes_what_numpy_writes(case):
    check(case, FAST)


@settings(max_examples=8)
@given(tiled())
def test_torch_writes_what_numpy_writes_and_reads_it_back(case):
    check(case, TORCH)


@EVERY
def test_every_dtype_survives_gaps_of_more_than_65535(twin):
    old, new = every_dtype_far_apart()
    for name, delta in Delta.between(old, new).items():
        for base in (None, old[name].data):
            coded = subset.encode(delta, base, twin=twin)
            assert subset.decode(coded, spec_of(delta), base, twin=twin) == delta


@given(st.integers(1, 2**20), st.sampled_from(["U8", "BF16", "F32", "F64"]), st.integers(1, 2**64 - 1))
def test_one_change_anywhere_by_any_step_comes_back(position, dtype, step):
    width = unsigned(dtype).itemsize
    steps = np.array([step % 2 ** (8 * width) or 1], unsigned(dtype))
    for total in (position + 1, 2**40):
        delta = TensorDelta(dtype, (total,), np.array([position]), steps)
        coded = subset.encode(delta, tile=(1, total))
        assert subset.decode(coded, spec_of(delta)) == delta


@EVERY
def test_all_densities_and_ladders_come_back(twin):
    rng = np.random.default_rng(0)
    old = random_bits(rng, "BF16", (130, 65))
    for share in (0.001, 0.49, 0.51, 1.0):
        new = old.copy()
        where = rng.random(old.data.size) < share
        new.data[where] += (rng.geometric(0.3, where.sum()) * rng.choice([-1, 1], where.sum())).astype(np.uint16)
        check((old, between_bits(old, new), None), twin)


def test_the_example_of_the_specification():
    digits = "3800 3a80 3c00 3c80 3a80 3c00 bc00 3c01 3a81 3c00 3c02 3c03 3c00 3c00 3a82 3c00"
    old = np.array([int(bits, 16) for bits in digits.split()], np.uint16)
    delta = TensorDelta("BF16", (16,), np.array([1, 4, 6, 8]), np.array([1, 65535, 1, 3], np.uint16))
    for twin in (PLAIN, FAST, TORCH):
        assert subset.encode(delta, old, twin=twin).payload.tobytes() == bytes.fromhex("85 58")


def test_rows_without_a_change_are_left_out_where_chance_would_have_hit_them():
    rng = np.random.default_rng(0)
    rows = np.sort(rng.choice(1000, 100, replace=False))
    positions = (rows[:, None] * 256 + np.sort(rng.choice(256, (100, 8)), 1)).reshape(-1)
    positions = np.unique(positions)
    idle = TensorDelta("BF16", (1000, 256), positions, np.ones(positions.size, np.uint16))
    anywhere = np.sort(rng.choice(256_000, positions.size, replace=False))
    scattered = TensorDelta("BF16", (1000, 256), anywhere, np.ones(anywhere.size, np.uint16))
    assert subset.encode(idle).entries[0].dead == 900
    assert subset.encode(scattered).entries[0].dead == 0
    assert subset.encode(idle).payload.size < 0.75 * subset.encode(scattered).payload.size


def test_rows_that_are_idle_by_chance_are_not_looked_at_twice(monkeypatch):
    positions = np.flatnonzero(np.random.default_rng(0).random(576 * 576) < 0.001)
    delta = TensorDelta("BF16", (576, 576), positions, np.ones(positions.size, np.uint16))
    assert np.unique(positions // 576).size < 0.5 * 576
    monkeypatch.setattr(subset.TileChange, "ranked_among", None)
    for old in (None, np.full(576 * 576, 0x3C00, np.uint16)):
        assert subset.encode(delta, old).entries[0].dead == 0


def test_a_large_tensor_is_cut_into_blocks_of_rows_and_a_thread_reads_its_own_tile():
    assert tiles.choose((4096, 1024)) == (4096, 1024)
    assert tiles.choose((49152, 576)) == (tiles.TARGET // 576, 576)
    assert tiles.choose((2**25,)) == (1, tiles.TARGET)
    positions = np.arange(5, 2**24, 100_003)
    delta = TensorDelta("U8", (2**24,), positions, np.ones(positions.size, np.uint8))
    coded = subset.encode(delta)
    assert len(coded.entries) == 4
    jobs = subset.to_decode(coded, spec_of(delta), None)
    assert np.array_equal(subset.decode_tile(jobs[2], FAST)[0], positions[positions // 2**22 == 2])


SPEC = TensorSpec("w", "BF16", (30, 10), 4)
DELTA = TensorDelta("BF16", (30, 10), np.array([3, 50, 51, 299]), np.array([1, 65533, 1, 40], np.uint16))


def hostile(coded: Coded, seed: int) -> Coded:
    """The same tensor's entries and payload with bits flipped in the one or the other, or an end cut off."""
    rng = np.random.default_rng(seed)
    (entry,) = coded.entries
    payload, lists, dead = coded.payload.copy(), [row._asdict() for row in entry.lists], entry.dead
    how = rng.integers(4)
    if how == 0:
        payload[rng.integers(payload.size)] ^= 1 << rng.integers(8)
    elif how == 1:
        payload = payload[: rng.integers(1, payload.size + 1)]
    elif how == 2:
        row = lists[rng.integers(len(lists))]
        row["k"] = int(rng.integers(48))
    else:
        row = lists[rng.integers(len(lists))]
        ladder = list(row["ladder"])
        ladder[: len(ladder)] = sorted(rng.integers(0, row["changed"] + 1, len(ladder)).tolist(), reverse=True)
        row["ladder"] = tuple(rung for rung in ladder if rung)
    rows = tuple(type(entry.lists[0])(**row) for row in lists)
    return Coded(coded.tile, (TileEntry(payload.size, dead, rows),), payload)


@EVERY
def test_no_bits_crash_a_reader_or_lead_out_of_the_tensor(twin):
    rng = np.random.default_rng(0)
    refused = 0
    for seed in range(60 if twin is TORCH else 400):
        dtype = ("U8", "BF16", "F32", "F64")[seed % 4]
        old = random_bits(rng, dtype, (30, 10))
        delta = between_bits(old, changed(rng, old, ("a few by one", "half", "anything")[seed % 3]))
        if not delta.changed:
            continue
        base = old.data if seed % 5 else None
        coded = subset.encode(delta, base, tile=(30, 10))
        wrong = rng.permutation(old.data) if base is not None and seed % 7 == 0 else base
        try:
            found = subset.decode(hostile(coded, seed), spec_of(delta), wrong, twin=twin)
        except (FormatError, WrongBase):
            refused += 1
            continue
        positions, steps = found.sparse()
        assert (np.diff(positions) > 0).all()
        assert 0 <= positions[0] <= positions[-1] < 300
        assert (steps != 0).all()
    assert refused > 20


WRONG = {
    "bits behind the last list": lambda bits: [*bits, 1],
    "a byte behind the last list": lambda bits: [*bits, *[0] * 8],
    "UNARY cut off": lambda bits: bits[:-8],
    "a list beyond the tensor": lambda bits: [*bits[:-2], 0, 0, 0, 0, 0, 1],
}


@EVERY
@pytest.mark.parametrize("damage", WRONG.values(), ids=WRONG)
def test_a_payload_that_is_not_the_entry_s_is_refused(twin, damage):
    coded = subset.encode(DELTA)
    (entry,) = coded.entries
    bits = damage(np.unpackbits(coded.payload, bitorder="little").tolist())
    payload = np.packbits(np.array(bits, np.uint8), bitorder="little")
    with pytest.raises(FormatError, match=r"^w: "):
        subset.decode(Coded(coded.tile, (TileEntry(payload.size, 0, entry.lists),), payload), SPEC, twin=twin)


@EVERY
def test_a_step_of_half_the_range_is_negative(twin):
    delta = TensorDelta("U8", (9,), np.array([4]), np.array([128], np.uint8))
    coded = subset.encode(delta)
    bits = np.unpackbits(coded.payload, bitorder="little")
    assert subset.decode(coded, spec_of(delta), twin=twin) == delta
    sign = coded.entries[0].lists[0].k + 6  # behind LOW of one position and six raw bits
    assert bits[sign] == 1
    bits[sign] = 0
    payload = np.packbits(bits, bitorder="little")
    with pytest.raises(FormatError, match="half the range"):
        subset.decode(Coded(coded.tile, coded.entries, payload), spec_of(delta), twin=twin)


@EVERY
def test_the_listed_unchanged_elements_and_the_changed_are_all_there_are(twin):
    delta = TensorDelta("U8", (100,), np.arange(90), np.ones(90, np.uint8))
    coded = subset.encode(delta)
    (entry,) = coded.entries
    assert entry.lists[0].inverted
    with pytest.raises(FormatError, match="not all that it has"):
        subset.decode(Coded((1, 101), coded.entries, coded.payload), TensorSpec("w", "U8", (101,), 90), twin=twin)


@EVERY
def test_counts_beyond_what_the_payload_holds_cost_no_memory(twin):
    lists = subset.encode(DELTA).entries[0].lists[0]._replace(changed=2**40, written=2**40, k=0, ladder=())
    coded = Coded((1, 2**45), (TileEntry(3, 0, (lists,)),), np.full(3, 255, np.uint8))
    tracemalloc.start()
    with pytest.raises(FormatError, match="ends inside its lists"):
        subset.decode(coded, TensorSpec("w", "BF16", (2**45,), 2**40), twin=twin)
    assert tracemalloc.get_traced_memory()[1] < 200_000
    tracemalloc.stop()


@EVERY
def test_a_few_dead_rows_among_a_trillion_cost_no_memory(twin):
    rows = 2**40
    facts = plan(np.array([rows - 1]), np.array([[1] + [0] * 7]))
    changes = Changes(np.array([1]), np.array([1]), np.array([0]), np.ones(1, np.uint8), rows, np.array([2**39]))
    facts, payload = FAST.pack(changes)
    found = twin.unpack(facts, payload, most=1, kind=np.dtype(np.uint8), rows=rows, dead=rows - 1)
    assert (found.rows.tolist(), found.dead_listed) == ([2**39], False)


@EVERY
@pytest.mark.parametrize("dtype", SCHEMES)
def test_other_weights_are_refused_or_give_a_change_in_range(twin, dtype):
    rng = np.random.default_rng(1)
    old = random_bits(rng, dtype, (64, 60))
    delta = between_bits(old, changed(rng, old, "half"))
    coded = subset.encode(delta, old.data)
    zeros = np.zeros_like(old.data)
    with pytest.raises(WrongBase, match=r"^w: "):
        subset.decode(coded, spec_of(delta), zeros, twin=twin)


@pytest.mark.parametrize("dtype", sorted(WIDTHS.keys() - SCHEMES.keys()))
def test_a_dtype_without_exponents_has_one_class(dtype):
    old = random_bits(np.random.default_rng(0), dtype, (300,))
    delta = between_bits(old, changed(np.random.default_rng(1), old, "a few by one"))
    assert same(subset.encode(delta, old.data), subset.encode(delta))
