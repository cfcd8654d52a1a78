"""Codec gap: every change comes back, by our reader and by a second one, and no stream takes it out of the tensor."""

import tracemalloc

import numpy as np
import pytest
import reference
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from strategies import every_dtype_far_apart, pairs

from deltawire.errors import FormatError, TooLarge
from deltawire.format.codecs import gap
from deltawire.format.codecs.base import compress, decompress, unzigzag, zigzag
from deltawire.weights.bits import Bits, unsigned
from deltawire.weights.delta import Delta, TensorDelta, between_bits
from deltawire.weights.table import TensorSpec


def spec_of(delta: TensorDelta) -> TensorSpec:
    return TensorSpec("w", delta.dtype, delta.shape, delta.changed)


def as_dict(delta: TensorDelta) -> dict[int, int]:
    return {int(position): int(step) for position, step in zip(*delta.sparse(), strict=True)}


def packed(*data: int) -> np.ndarray:
    return compress(np.array(data, np.uint8))


@given(pairs())
def test_every_change_comes_back(pair):
    delta = between_bits(*pair)
    assert gap.decode(gap.encode(delta), spec_of(delta)) == delta


@given(pairs())
def test_a_second_reader_written_from_the_specification_finds_the_same_change(pair):
    delta = between_bits(*pair)
    streams = {name: stream.tobytes() for name, stream in gap.encode(delta).items()}
    assert reference.gap(streams, delta.steps.itemsize) == as_dict(delta)


def test_every_dtype_survives_gaps_of_more_than_65535():
    for delta in Delta.between(*every_dtype_far_apart()).values():
        assert gap.decode(gap.encode(delta), spec_of(delta)) == delta


@given(st.integers(1, 2**20), st.sampled_from(["U8", "BF16", "F32", "F64"]), st.integers(1, 2**64 - 1))
def test_one_change_anywhere_by_any_step_comes_back(position, dtype, step):
    width = unsigned(dtype).itemsize
    steps = np.array([step % 2 ** (8 * width) or 1], unsigned(dtype))
    for total in (position + 1, 2**40):
        delta = TensorDelta(dtype, (total,), np.array([position]), steps)
        assert gap.decode(gap.encode(delta), spec_of(delta)) == delta


def test_a_gap_across_a_tensor_of_a_trillion_elements_takes_a_few_bytes():
    delta = TensorDelta("BF16", (2**40,), np.array([0, 2**40 - 1]), np.ones(2, np.uint16))
    streams = gap.encode(delta)
    assert sum(stream.size for stream in streams.values()) < 40
    assert gap.decode(streams, spec_of(delta)) == delta


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_zigzag_makes_small_steps_small_and_loses_none(width):
    kind = np.dtype(f"<u{width}")
    top = np.iinfo(kind).max
    steps = np.array([0, top, 1, top - 1, 2, top // 2, top // 2 + 1], kind)
    assert zigzag(steps).tolist() == [0, 1, 2, 3, 4, top - 1, top]
    assert np.array_equal(unzigzag(zigzag(steps)), steps)
    assert [reference.unzigzag(int(value), width) for value in zigzag(steps)] == steps.tolist()


TOTAL = 300
GAPS = {
    "position on the last element plus one": [0, 255, 44],
    "escape beyond the tensor": [0, 255, 172, 2],
    "escape that wraps 64 bits": [0, 255, *[255] * 9, 1],
    "varint of eleven bytes": [0, 255, *[128] * 10, 1],
    "varint cut off": [0, 255, 128],
    "varint not in its shortest form": [0, 255, 133, 0],
    "escape without a varint": [0, 255],
    "too few": [0],
    "too many": [0, 1, 2],
    "none": [],
}


@pytest.mark.parametrize("gaps", GAPS.values(), ids=GAPS)
def test_positions_that_leave_the_tensor_or_do_not_add_up_are_refused(gaps):
    spec = TensorSpec("w", "BF16", (TOTAL,), 2)
    with pytest.raises(FormatError, match="w"):
        gap.decode({"gaps": packed(*gaps), "steps": packed(2, 2)}, spec)


def test_the_last_element_itself_is_accepted():
    delta = gap.decode({"gaps": packed(0, 255, 43), "steps": packed(2, 1)}, TensorSpec("w", "BF16", (TOTAL,), 2))
    assert as_dict(delta) == {0: 1, 299: 65535}


STEPS = {
    "a zero step": [2, 0],
    "wider than 16 bits": [2, 255, 255, 4],
    "varint of eleven bytes": [2, *[128] * 10, 1],
    "varint cut off": [2, 130],
    "varint not in its shortest form": [2, 130, 0],
    "too few": [2],
    "too many": [2, 2, 2],
}


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_steps_that_are_zero_too_wide_or_do_not_add_up_are_refused(steps):
    spec = TensorSpec("w", "BF16", (TOTAL,), 2)
    with pytest.raises(FormatError, match="w"):
        gap.decode({"gaps": packed(0, 0), "steps": packed(*steps)}, spec)


@pytest.mark.parametrize("suffix", gap.SUFFIXES)
def test_a_frame_that_claims_a_gigabyte_is_refused_before_memory_is_spent_on_it(suffix):
    frame = zstandard.ZstdCompressor().compress(bytes(1 << 20))
    lying = frame[:4] + b"\xa0" + (1 << 30).to_bytes(4, "little") + frame[9:]  # §3.1.1 of RFC 8878: content size
    assert zstandard.frame_content_size(lying) == 1 << 30
    streams = {"gaps": packed(0, 0), "steps": packed(2, 2), suffix: np.frombuffer(lying, np.uint8)}
    tracemalloc.start()
    with pytest.raises(TooLarge, match="1,073,741,824 bytes where at most"):
        gap.decode(streams, TensorSpec("w", "BF16", (TOTAL,), 2))
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_a_count_beyond_what_the_streams_hold_costs_no_memory():
    spec = TensorSpec("w", "BF16", (2**47,), 2**46)
    tracemalloc.start()
    with pytest.raises(FormatError, match="streams too short"):
        gap.decode({"gaps": packed(0, 0), "steps": packed(2, 2)}, spec)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def frames() -> dict[str, bytes]:
    good = zstandard.ZstdCompressor(write_content_size=True).compress(b"abc" * 100)
    return {
        "not zstd": b"abcdefgh",
        "empty": b"",
        "cut off": good[:-1],
        "bytes behind it": good + b"\0",
        "two frames": good + good,
        "without its size": zstandard.ZstdCompressor(write_content_size=False).compress(b"abc" * 100),
    }


@pytest.mark.parametrize("frame", frames().values(), ids=frames())
def test_a_stream_that_is_not_one_whole_zstd_frame_is_refused(frame):
    with pytest.raises(FormatError, match=r"w\.gaps"):
        decompress(np.frombuffer(frame, np.uint8), limit=1000, what="w.gaps")


def test_streams_of_half_a_million_changes_cost_under_two_bytes_each():
    rng = np.random.default_rng(0)
    old = Bits("BF16", (5_000_000,), np.zeros(5_000_000, np.uint16))
    new = old.copy()
    new.data[rng.choice(5_000_000, 50_000, replace=False)] = 1
    assert sum(stream.size for stream in gap.encode(between_bits(old, new)).values()) < 50_000 * 2
