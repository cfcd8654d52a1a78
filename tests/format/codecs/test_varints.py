"""The loops of codec gap, in Numba and in numpy: equal bytes, equal positions, and equal refusals of any bytes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltawire.format.codecs import varints_numba as compiled
from deltawire.format.codecs import varints_numpy as plain

LARGE = [126, 127, 128, 254, 255, 256, 382, 383, 2**14, 2**21 + 1, 2**35, 2**40]
EDGES = [0, 1, 2, 3, 64, 127, 128, 129, 130, 253, 254, 255]
TOTALS = [1, 254, 255, 300, 2**15, 2**48 - 1]
any_bytes = st.lists(st.sampled_from(EDGES) | st.integers(0, 255), max_size=60).map(lambda b: np.array(b, np.uint8))


def read(loops, data, size, total):
    positions = np.full(size, -7, np.int64)
    used = loops.read_gaps(data, total, positions)
    return used, positions.tolist() if used >= 0 else None


def read_values(loops, data, size, width):
    values = np.zeros(size, width)
    used = loops.read_varints(data, np.uint64(np.iinfo(width).max), values)
    return used, values.tolist() if used >= 0 else None


@given(st.lists(st.integers(0, 400) | st.sampled_from(LARGE), max_size=80))
def test_gaps_are_written_alike_and_read_alike(gaps):
    positions = np.cumsum(np.array(gaps, np.int64) + 1) - 1
    written = []
    for loops in (compiled, plain):
        out = np.zeros(11 * positions.size, np.uint8)
        written.append(out[: loops.write_gaps(positions, out)])
    assert np.array_equal(*written)
    for loops in (compiled, plain):
        assert read(loops, written[0], positions.size, 2**48) == (written[0].size, positions.tolist())


@pytest.mark.parametrize("width", [np.uint8, np.uint16, np.uint32, np.uint64])
@given(data=st.data())
def test_values_are_written_alike_and_read_alike(width, data):
    values = np.array(data.draw(st.lists(st.integers(1, int(np.iinfo(width).max)), max_size=80)), width)
    written = []
    for loops in (compiled, plain):
        out = np.zeros(10 * values.size, np.uint8)
        written.append(out[: loops.write_varints(values, out)])
    assert np.array_equal(*written)
    for loops in (compiled, plain):
        assert read_values(loops, written[0], values.size, width) == (written[0].size, values.tolist())


@given(any_bytes, st.integers(0, 40), st.sampled_from(TOTALS))
def test_any_bytes_are_read_or_refused_alike(data, size, total):
    assert read(plain, data, size, total) == read(compiled, data, size, total)
    for width in (np.uint8, np.uint64):
        assert read_values(plain, data, size, width) == read_values(compiled, data, size, width)


@pytest.mark.parametrize("shift", range(13))
def test_a_token_may_lie_across_the_end_of_a_chunk(shift, monkeypatch):
    monkeypatch.setattr(plain, "CHUNK", 12)
    random = np.random.default_rng(shift)
    gaps = random.choice([*range(100, 140), *LARGE], 200)
    positions = np.cumsum(np.concatenate((np.zeros(shift, np.int64), gaps)) + 1) - 1
    one, other = np.zeros(11 * positions.size, np.uint8), np.zeros(11 * positions.size, np.uint8)
    used = compiled.write_gaps(positions, one)
    assert plain.write_gaps(positions, other) == used
    assert np.array_equal(one, other)
    for cut in (used, used - 1, used - 30):
        expected = read(compiled, one[:cut], positions.size, 2**48)
        assert read(plain, one[:cut], positions.size, 2**48) == expected
    assert read(plain, one, positions.size - 5, 2**48) == read(compiled, one, positions.size - 5, 2**48)


@pytest.mark.parametrize("byte", [128, 200, 254, 255])
def test_long_runs_of_large_bytes_end_alike(byte, monkeypatch):
    monkeypatch.setattr(plain, "CHUNK", 16)
    for size in (15, 16, 17, 40):
        data = np.array([*[byte] * size, 3], np.uint8)
        for count in (1, size, size + 1):
            assert read(plain, data, count, 2**48) == read(compiled, data, count, 2**48)
            assert read_values(plain, data, count, np.uint64) == read_values(compiled, data, count, np.uint64)
