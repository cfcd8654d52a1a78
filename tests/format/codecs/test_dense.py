"""Codec dense: one step per element comes back, by our reader and by a second one, and nothing else passes for it."""

import numpy as np
import pytest
import reference
from hypothesis import given
from strategies import dtypes, pairs, random_bits, seeds, shapes

from deltawire.errors import FormatError, TooLarge, Truncated
from deltawire.format.codecs import dense
from deltawire.format.codecs.base import compress, decompress, store, zstd
from deltawire.weights.bits import zeros
from deltawire.weights.delta import TensorDelta, between_bits
from deltawire.weights.table import TensorSpec


def spec_of(delta: TensorDelta) -> TensorSpec:
    return TensorSpec("w", delta.dtype, delta.shape, delta.changed)


@given(pairs())
def test_every_change_comes_back(pair):
    delta = between_bits(*pair)
    assert dense.decode(dense.encode(delta), spec_of(delta)) == delta


@given(dtypes, shapes, seeds)
def test_a_first_version_from_all_zero_bits_comes_back(dtype, shape, seed):
    weights = random_bits(np.random.default_rng(seed), dtype, shape)
    delta = between_bits(zeros(dtype, shape), weights)
    back = zeros(dtype, shape)
    dense.decode(dense.encode(delta), spec_of(delta)).apply_(back.data)
    assert back == weights


@given(pairs())
def test_a_second_reader_written_from_the_specification_finds_the_same_change(pair):
    delta = between_bits(*pair)
    positions, steps = delta.sparse()
    expected = dict(zip(positions.tolist(), steps.tolist(), strict=True))
    assert reference.dense({"dense": dense.encode(delta)["dense"].tobytes()}, delta.steps.itemsize) == expected


def test_steps_of_a_tensor_that_moved_by_one_everywhere_take_a_few_bytes():
    delta = TensorDelta("F32", (100_000,), None, np.ones(100_000, np.uint32))
    assert dense.encode(delta)["dense"].size < 200


@pytest.mark.parametrize(
    ("planes", "error"),
    [
        (np.ones(7, np.uint8), Truncated),
        (np.ones(9, np.uint8), TooLarge),
        (np.ones(1 << 20, np.uint8), TooLarge),
        (np.zeros(8, np.uint8), FormatError),
    ],
    ids=["too short", "too long", "far too long", "fewer changes than listed"],
)
def test_a_stream_that_is_not_the_tensors_is_refused(planes, error):
    spec = TensorSpec("w", "BF16", (4,), 4)
    with pytest.raises(error, match="w"):
        dense.decode({"dense": compress(planes)}, spec)


@pytest.mark.parametrize("size", [0, 1, (128 << 10) - 1, 128 << 10, (128 << 10) + 1, 400_000])
def test_a_frame_that_holds_bytes_as_they_are_is_read_as_any_other(size):
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    frame = store(data)
    assert decompress(frame, limit=size, what="it").tobytes() == data.tobytes()
    assert frame.size <= size + 14 + 3 * (1 + size // (128 << 10))
    for end in range(max(0, frame.size - 3), frame.size):
        with pytest.raises(FormatError):
            decompress(frame[:end], limit=size, what="it")


def test_a_frame_of_any_size_is_read_with_the_memory_of_one_block():
    """As zstd's decoders refuse a window of more than 128 MiB, and an embedding takes more than that."""
    block = 128 << 10
    data = np.random.default_rng(0).integers(0, 256, 4 * block, np.uint8)
    narrow = {zstd.DecompressionParameter.window_log_max: block.bit_length() - 1}
    read = zstd.ZstdDecompressor(options=narrow).decompress(store(data).data, max_length=data.size + 1)
    assert read == data.tobytes()


@given(pairs())
def test_steps_that_are_stored_are_those_that_are_compressed(pair):
    change = between_bits(*pair)
    spec = TensorSpec("w", change.dtype, change.shape, change.changed)
    assert dense.decode(dense.encode(change, stored=True), spec) == change
