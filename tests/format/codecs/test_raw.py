"""Codec raw: positions and new values, against the old weights both ways."""

import numpy as np
import pytest
from hypothesis import given
from strategies import every_dtype_far_apart, pairs

from deltawire.errors import FormatError
from deltawire.format.codecs import raw
from deltawire.weights.bits import Bits
from deltawire.weights.delta import TensorDelta, between_bits
from deltawire.weights.table import TensorSpec

OLD = Bits("BF16", (10,), np.arange(10, dtype=np.uint16))
SPEC = TensorSpec("w", "BF16", (10,), 4)


@given(pairs())
def test_every_change_comes_back(pair):
    old, new = pair
    delta = between_bits(old, new)
    streams = raw.encode(delta, old)
    assert streams["indices"].dtype == np.int32
    assert np.array_equal(streams["values"], new.data[streams["indices"]])
    assert raw.decode(streams, TensorSpec("w", old.dtype, old.shape, delta.changed), old) == delta


def test_every_dtype_survives_gaps_of_more_than_65535():
    olds, news = every_dtype_far_apart()
    for name, old in olds.items():
        delta = between_bits(old, news[name])
        assert raw.decode(raw.encode(delta, old), TensorSpec(name, old.dtype, old.shape, 5), old) == delta


def test_a_listed_value_equal_to_the_old_one_is_no_change():
    streams = {"indices": np.array([2, 5], np.int32), "values": np.array([2, 6], np.uint16)}
    assert raw.decode(streams, SPEC, OLD) == TensorDelta("BF16", (10,), np.array([5]), np.array([1], np.uint16))


HOSTILE = {
    "unsorted": [3, 2, 5, 6],
    "doubled": [3, 3, 5, 6],
    "negative": [-1, 2, 5, 6],
    "beyond the end": [1, 2, 5, 10],
    "far beyond the end": [1, 2, 5, 2**62],
    "out of range in the middle, where differences wrap": [0, 6 * 10**18, -6 * 10**18, 5],
    "too few": [1, 2, 3],
    "too many": [1, 2, 3, 4, 5],
}


@pytest.mark.parametrize("indices", HOSTILE.values(), ids=HOSTILE)
def test_positions_that_are_not_sorted_unique_and_in_range_are_refused(indices):
    streams = {"indices": np.array(indices, np.int64), "values": np.zeros(4, np.uint16)}
    with pytest.raises(FormatError, match="w"):
        raw.decode(streams, SPEC, OLD)
