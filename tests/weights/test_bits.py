"""Bits: what may be shipped, how wide it is, and what counts as the same."""

import numpy as np
import pytest
import torch
from hypothesis import given
from strategies import dtypes, pairs, random_bits, shapes

from deltawire.errors import DtypeMismatch, ShapeMismatch
from deltawire.weights.bits import WIDTHS, Bits, count, unsigned, zeros
from deltawire.weights.tensors import NAMES


@pytest.mark.parametrize("dtype", WIDTHS)
def test_every_dtype_is_as_wide_as_torch_says(dtype):
    assert unsigned(dtype).itemsize == WIDTHS[dtype] == getattr(torch, NAMES[dtype]).itemsize
    assert unsigned(dtype).kind == "u"


@pytest.mark.parametrize("dtype", ["C64", "F4", "F6_E2M3", "bfloat16", ""])
def test_a_dtype_that_cannot_be_shipped_is_refused_with_the_ones_that_can(dtype):
    with pytest.raises(DtypeMismatch, match="BF16"):
        unsigned(dtype)


@pytest.mark.parametrize(
    "data", [np.zeros((2, 2), np.uint16), np.zeros(4, np.int16), np.zeros(4, np.uint32), np.zeros(4, ">u2")]
)
def test_data_that_is_not_flat_unsigned_and_little_endian_is_refused(data):
    with pytest.raises(DtypeMismatch, match="BF16 needs flat"):
        Bits("BF16", (4,), data)


def test_data_that_does_not_fill_the_shape_is_refused():
    with pytest.raises(ShapeMismatch, match=r"3 elements do not fill shape \[2, 2\]"):
        Bits("BF16", (2, 2), np.zeros(3, np.uint16))


def test_a_scalar_has_one_element_and_a_zero_size_tensor_none():
    assert (count(()), count((0,)), count((3, 0, 2)), count((2, 3))) == (1, 0, 0, 6)


def test_equality_is_of_bits_so_nan_equals_itself_and_minus_zero_is_not_zero():
    nan = Bits("F32", (1,), np.array([0x7FC0_BEEF], np.uint32))
    assert nan == nan.copy()
    assert nan != Bits("F32", (1,), np.array([0x7FC0_0000], np.uint32))
    assert zeros("F32", (1,)) != Bits("F32", (1,), np.array([0x8000_0000], np.uint32))


@given(pairs())
def test_equality_sees_dtype_shape_and_every_bit(pair):
    old, new = pair
    assert (old == new) == (old.data.tobytes() == new.data.tobytes())
    assert old != Bits(old.dtype, (*old.shape, 1), old.data)
    if old.dtype != "I64":
        assert old != Bits("I64", old.shape, old.data.astype(np.uint64))


@given(dtypes, shapes)
def test_a_copy_has_memory_of_its_own(dtype, shape):
    bits = random_bits(np.random.default_rng(0), dtype, shape)
    copy = bits.copy()
    copy.data[:] += 1
    assert bits == random_bits(np.random.default_rng(0), dtype, shape)
    assert copy != bits or not bits.data.size
    assert not zeros(dtype, shape).data.any()
