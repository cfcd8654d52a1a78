"""The compiled loops do what their plain numpy twins say, for every element width and kind of memory."""

import threading
import tracemalloc

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from strategies import pairs

from deltawire.weights import kernels, kernels_numba
from deltawire.weights import kernels_numpy as plain

WIDTHS = [np.uint8, np.uint16, np.uint32, np.uint64]


@given(pairs())
def test_compare_and_collect_finds_the_positions_and_steps_its_twin_finds(pair):
    old, new = pair
    positions, steps = kernels.compare_and_collect(old.data, new.data)
    expected = kernels.plain.compare_and_collect(old.data, new.data)
    assert (positions.dtype, steps.dtype) == (np.int64, old.data.dtype)
    assert np.array_equal(positions, expected[0])
    assert np.array_equal(steps, expected[1])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("offset", [0, 1])
def test_compare_finds_a_change_at_every_place_of_a_block_wherever_the_memory_begins(width, offset):
    for size in (0, 1, 31, 32, 33, 71):
        old = np.arange(offset + size, dtype=width)[offset:]
        for place in range(size):
            new = old.copy()
            new[place] += width(3)
            positions, steps = kernels.compare_and_collect(old, new)
            assert (positions.tolist(), steps.tolist()) == ([place], [3])
        assert kernels.compare_and_collect(old, old + width(1))[0].tolist() == list(range(size))


@given(pairs(), st.integers(0, 2**40))
def test_apply_with_digest_writes_and_sums_what_its_twin_does(pair, start):
    old, new = pair
    change = kernels.plain.compare_and_collect(old.data, new.data)
    one, other = old.copy(), old.copy()
    expected = kernels.plain.apply_with_digest(other.data, *change, start)
    assert kernels.apply_with_digest(one.data, *change, start) == expected
    assert one == other == new


@given(pairs())
def test_scatter_writes_what_its_twin_writes(pair):
    old, new = pair
    positions = np.flatnonzero(old.data != new.data)
    one, other = old.copy(), old.copy()
    kernels.scatter(one.data, positions, new.data[positions])
    kernels.plain.scatter(other.data, positions, new.data[positions])
    assert one == other == new


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("changed", [0, 1, kernels_numba.AHEAD, kernels_numba.AHEAD + 1, 3 * kernels_numba.AHEAD])
def test_gather_and_scatter_reach_every_position_however_many_there_are(width, changed):
    random = np.random.default_rng(changed)
    bits = random.integers(0, np.iinfo(width).max, 5 * kernels_numba.AHEAD, width, endpoint=True)
    positions = np.sort(random.choice(bits.size, changed, replace=False))
    assert np.array_equal(kernels.gather(bits, positions), kernels.plain.gather(bits, positions))
    one, other = bits.copy(), bits.copy()
    kernels.scatter(one, positions, ~bits[positions])
    kernels.plain.scatter(other, positions, ~bits[positions])
    assert np.array_equal(one, other)
    assert np.count_nonzero(one != bits) == changed


@given(pairs(), st.integers(0, 2**40))
def test_the_digest_kernels_sum_what_their_twins_sum(pair, start):
    old, new = pair
    assert kernels.digest_sweep(old.data, start) == kernels.plain.digest_sweep(old.data, start)
    positions = np.flatnonzero(old.data != new.data)
    values = new.data[positions]
    assert kernels.digest_at(positions, values) == kernels.plain.digest_at(positions, values)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_twins_sum_what_plain_python_sums(width):
    data = np.random.default_rng(1).integers(0, np.iinfo(width).max, 40, width, endpoint=True)
    assert kernels.plain.digest_sweep(data) == reference.digest(map(int, data)) == kernels.digest_sweep(data)


@pytest.mark.parametrize("width", WIDTHS)
def test_memory_that_is_read_only_or_unaligned_as_in_a_file_is_read_right(width):
    data = np.random.default_rng(2).integers(0, np.iinfo(width).max, 100, width, endpoint=True)
    in_file = np.frombuffer(b"x" + data.tobytes(), width, offset=1)
    later = data.copy()
    later[[0, 50, 99]] += 1
    assert kernels.digest_sweep(in_file) == kernels.digest_sweep(data)
    assert kernels.compare_and_collect(in_file, later)[0].tolist() == [0, 50, 99]


@pytest.mark.parametrize("size", [31, 32, 33, 64, 1000])
def test_a_change_is_found_wherever_it_falls_in_a_block(size):
    for at in {0, size // 2, 31 % size, size - 1}:
        old, new = np.zeros(size, np.uint16), np.zeros(size, np.uint16)
        new[at] = 65535
        positions, steps = kernels.compare_and_collect(old, new)
        assert (positions.tolist(), steps.tolist()) == ([at], [65535])


def test_two_threads_in_one_kernel_both_get_the_right_sum():
    data = np.random.default_rng(3).integers(0, 65536, 2_000_000, np.uint16)
    half = data.size // 2
    barrier, sums = threading.Barrier(2), [0, 0]

    def sweep(k: int) -> None:
        barrier.wait()
        sums[k] = kernels.digest_sweep(data[k * half : (k + 1) * half], k * half)

    threads = [threading.Thread(target=sweep, args=(k,), daemon=True) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(sums) % 2**64 == kernels.plain.digest_sweep(data)


def test_after_warming_up_no_element_width_compiles_anything_more():
    kernels.warm_up()
    digests, writes = (
        (kernels_numba._digest_sweep, kernels_numba._digest_at),
        (kernels_numba._apply, kernels_numba._gather, kernels_numba._scatter),
    )
    loops = (kernels_numba._collect, *digests, *writes)
    signatures = [len(loop.signatures) for loop in loops]
    for width in WIDTHS:
        old, new = np.zeros(100, width), np.ones(100, width)
        kernels.apply_with_digest(old, *kernels.compare_and_collect(old, new))
        kernels.digest_at(np.arange(100), new)
        kernels.digest_sweep(new)
        kernels.scatter(old, np.arange(100), kernels.gather(new, np.arange(100)))
    assert [len(loop.signatures) for loop in loops] == signatures


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("room", [0, 63, 64, 1023, 1024, 1100, 2047, 2048, 3000])
def test_a_comparison_without_room_stops_before_it_writes_beyond_and_goes_on_from_there(width, room):
    old, new = np.zeros(2500, width), np.ones(2500, width)
    positions, steps = np.full(4000, -7, np.int64), np.full(4000, 7, width)
    at, found = kernels_numba._collect(old, new, 0, 0, positions[:room], steps[:room])
    assert at == found <= room
    assert set(positions[room:]) == {-7}
    assert set(steps[room:]) == {7}
    assert kernels_numba._collect(old, new, at, found, positions, steps) == (2500, 2500)
    assert positions[:2500].tolist() == list(range(2500))
    assert set(steps[:2500]) == {1}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.02, 0.5, 1.0])
def test_changes_are_found_whole_however_often_their_arrays_grow(width, share):
    random = np.random.default_rng(5)
    old = random.integers(0, np.iinfo(width).max, 200_000, width, endpoint=True)
    new = old + (random.random(old.size) < share).astype(width)
    assert all(map(np.array_equal, kernels.compare_and_collect(old, new), plain.compare_and_collect(old, new)))


@pytest.mark.parametrize("width", WIDTHS)
def test_weights_written_while_they_are_compared_are_compared_as_they_are_when_read(width, monkeypatch):
    old, new = np.zeros(5000, width), np.zeros(5000, width)
    new[:3000] = 1  # more than there is room for at first, so the comparison goes on after a pause
    real, stops = kernels_numba._collect, []

    def collect(*arguments):
        stopped = real(*arguments)
        stops.append(stopped)
        new[:] = 3
        return stopped

    monkeypatch.setattr(kernels_numba, "_collect", collect)
    positions, steps = kernels.compare_and_collect(old, new)
    compared = stops[0][0]
    assert 0 < compared < 3000
    assert positions.tolist() == list(range(5000))
    assert set(steps[:compared]) == {1}
    assert set(steps[compared:]) == {3}


@pytest.mark.parametrize("width", WIDTHS)
def test_the_twins_join_their_chunks(width):
    random = np.random.default_rng(4)
    old = random.integers(0, np.iinfo(width).max, 3 * plain.CHUNK + 5, width, endpoint=True)
    new = old.copy()
    new[random.choice(old.size, old.size // 2, replace=False)] += width(7)
    change = kernels.compare_and_collect(old, new)
    found = plain.compare_and_collect(old, new)
    assert [part.dtype for part in found] == [part.dtype for part in change]
    assert all(map(np.array_equal, found, change))
    assert plain.digest_sweep(new, 11) == kernels.digest_sweep(new, 11)
    assert plain.digest_at(*change) == kernels.digest_at(*change)
    one, other = old.copy(), old.copy()
    assert plain.apply_with_digest(one, *change, 2**40) == kernels.apply_with_digest(other, *change, 2**40)
    assert np.array_equal(one, other)


def test_the_twins_need_little_memory_whatever_the_tensor():
    old = np.zeros(4_000_000, np.uint16)
    new = old.copy()
    new[::1000] = 1
    tracemalloc.start()
    plain.apply_with_digest(old, *plain.compare_and_collect(old, new))
    plain.digest_sweep(new)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()
