"""The algebra: new == old + delta, old == new + -delta, deltas fold, split and join, and nothing is half applied."""

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import every_dtype_far_apart, pairs, versions

from deltawire.errors import (
    ApplyError,
    DtypeMismatch,
    FormatError,
    MissingTensor,
    ShapeMismatch,
    UnknownTensor,
)
from deltawire.weights import kernels
from deltawire.weights.bits import Bits, count, unsigned, zeros
from deltawire.weights.delta import POSITION_BYTES, Delta, TensorDelta, between_bits
from deltawire.weights.digest import digest, moved
from deltawire.weights.tensors import as_bits, as_torch, equal

Weights = dict[str, Bits]


def copies(weights: Weights) -> Weights:
    return {name: bits.copy() for name, bits in weights.items()}


@given(versions(2))
def test_a_delta_leads_from_old_to_new_and_its_negative_back(chain):
    old, new = chain
    delta = Delta.between(old, new)
    assert equal(new, old + delta)
    assert equal(old, new + -delta)
    assert equal(old, old + delta + -delta)
    assert delta + -delta == Delta()


@given(versions(2))
def test_digests_after_a_delta_are_those_of_the_new_weights(chain):
    old, new = chain
    before = {name: bits.data.copy() for name, bits in old.items()}
    assert Delta.between(old, new).digests_after(digest(old), old) == digest(new)
    assert all(np.array_equal(before[name], bits.data) for name, bits in old.items())


@given(versions(2))
def test_torch_tensors_follow_the_same_algebra(chain):
    old, new = ({name: as_torch(bits) for name, bits in weights.items()} for weights in chain)
    delta = Delta.between(old, new)
    assert delta == Delta.between(*chain)
    result = old + delta
    assert equal(new, result)
    assert all(isinstance(tensor, torch.Tensor) and tensor.dtype == old[n].dtype for n, tensor in result.items())
    assert equal(old, new + -delta)


@given(versions(2))
def test_numpy_arrays_and_torch_tensors_mix(chain):
    old, new = chain
    ours = {n: b.data.view(np.float32).reshape(b.shape) if b.dtype == "F32" else as_torch(b) for n, b in old.items()}
    assert equal(new, ours + Delta.between(ours, new))


@given(versions(4))
def test_folding_is_associative_and_equals_the_direct_difference(chain):
    a, b, c = (Delta.between(old, new) for old, new in pairwise(chain))
    assert (a + b) + c == a + (b + c) == Delta.between(chain[0], chain[-1])
    assert -(a + b) == -b + -a
    assert Delta() + a == a == a + Delta()


@given(pairs())
def test_a_tensor_delta_counts_what_changes_and_keeps_it_the_smaller_way(pair):
    old, new = pair
    delta = between_bits(old, new)
    different = int((old.data != new.data).sum())
    assert (delta.changed, delta.total) == (different, count(old.shape))
    width = old.data.itemsize
    smaller_dense = different * (POSITION_BYTES + width) >= old.data.size * width
    assert (delta.positions is None) == (different > 0 and smaller_dense)
    positions, steps = delta.sparse()
    assert np.array_equal(positions, np.flatnonzero(old.data != new.data))
    assert steps.all()


@given(versions(3))
def test_a_delta_names_no_tensor_that_does_not_change(chain):
    delta = Delta.between(chain[0], chain[1])
    assert set(delta) == {name for name in chain[0] if chain[0][name] != chain[1][name]}
    assert delta.changed == sum(tensor.changed for tensor in delta.values())
    assert all(tensor.changed for tensor in (delta + Delta.between(chain[1], chain[2])).values())


@given(pairs(), st.lists(st.integers(0, 2000), max_size=4))
def test_a_change_split_for_shards_applies_to_each_and_joins_again(pair, cuts):
    old, new = pair
    delta = Delta.between({"w": old}, {"w": new})
    bounds = sorted({0, old.data.size, *(min(cut, old.data.size) for cut in cuts)})
    if not delta:
        return
    pieces = delta.split("w", bounds)
    joined = Delta()
    for piece, (start, stop) in zip(pieces, pairwise(bounds), strict=True):
        shard = old.data[start:stop].copy()
        piece.apply_(shard)
        assert np.array_equal(shard, new.data[start:stop])
        positions, steps = piece.sparse()
        joined += Delta({"w": TensorDelta(old.dtype, old.shape, positions + start, steps)})
    assert joined == delta
    assert sum(piece.changed for piece in pieces) == delta.changed


@pytest.mark.parametrize("bounds", [[0, 5], [1, 10], [0, 8, 5, 10], [0, 11]])
def test_bounds_that_do_not_cover_the_tensor_in_order_are_refused(bounds):
    delta = Delta.between({"w": zeros("U8", (10,))}, {"w": Bits("U8", (10,), np.ones(10, np.uint8))})
    with pytest.raises(FormatError, match="do not cover its 10 elements"):
        delta.split("w", bounds)


@given(versions(2))
def test_applying_in_place_writes_the_same_memory_and_moves_the_digests(chain):
    old, new = chain
    delta, live, sums = Delta.between(old, new), copies(old), digest(old)
    addresses = {name: bits.data.ctypes.data for name, bits in live.items()}
    for name, tensor in delta.items():
        positions, _ = tensor.sparse()
        before, after = tensor.apply_(live[name].data)
        assert before == kernels.plain.digest_at(positions, old[name].data[positions])
        assert after == kernels.plain.digest_at(positions, new[name].data[positions])
        sums[name] = moved(sums[name], before, after)
    assert live == new
    assert sums == digest(new)
    (-delta).apply_(live)
    assert live == old
    assert addresses == {name: bits.data.ctypes.data for name, bits in live.items()}


@given(versions(2))
def test_torch_tensors_are_patched_in_place(chain):
    old, new = chain
    live = {name: as_torch(bits.copy()) for name, bits in old.items()}
    pointers = {name: tensor.data_ptr() for name, tensor in live.items()}
    Delta.between(old, new).apply_(live)
    assert equal(live, new)
    assert pointers == {name: tensor.data_ptr() for name, tensor in live.items()}


def test_every_dtype_survives_gaps_of_more_than_65535():
    old, new = every_dtype_far_apart()
    delta = Delta.between(old, new)
    assert {tensor.changed for tensor in delta.values()} == {5}
    assert equal(new, old + delta)
    assert equal(old, new + -delta)


def test_steps_wrap_around_at_both_ends():
    old, new = Bits("U8", (2,), np.array([0, 255], np.uint8)), Bits("U8", (2,), np.array([255, 0], np.uint8))
    delta = between_bits(old, new)
    assert delta.steps.tolist() == [255, 1]
    assert (delta + delta).sparse()[1].tolist() == [254, 2]


def test_unchanged_tensors_are_the_same_objects_and_old_ones_are_untouched():
    old = {"a": torch.zeros(2), "b": torch.zeros(2)}
    new = old + Delta.between(old, {"a": torch.ones(2), "b": torch.zeros(2)})
    assert new["b"] is old["b"]
    assert new["a"] is not old["a"]
    assert old["a"].tolist() == [0, 0]


DELTA = Delta.between({"a": np.zeros(2, np.float32)}, {"a": np.ones(2, np.float32)})


@pytest.mark.parametrize(
    ("weights", "error", "says"),
    [
        ({"b": np.zeros(2, np.float32)}, UnknownTensor, "'a'"),
        ({"a": np.zeros(3, np.float32)}, ShapeMismatch, r"a has shape \[3\]|a has shape \[2\]"),
        ({"a": np.zeros(2, np.int32)}, DtypeMismatch, "a is F32 on one side and I32"),
    ],
)
def test_weights_that_are_not_the_deltas_are_refused(weights, error, says):
    for attempt in (lambda: weights + DELTA, lambda: DELTA.apply_(weights), lambda: DELTA.check(weights)):
        with pytest.raises(error, match=says):
            attempt()


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ({"a": np.zeros(2)}, {"a": np.zeros(2), "b": np.zeros(1)}, UnknownTensor),
        ({"a": np.zeros(2), "b": np.zeros(1)}, {"a": np.zeros(2)}, MissingTensor),
        ({"a": np.zeros(2)}, {"a": np.zeros((2, 1))}, ShapeMismatch),
        ({"a": np.zeros(2)}, {"a": np.zeros(2, np.float32)}, DtypeMismatch),
    ],
)
def test_two_versions_that_are_not_of_one_model_have_no_delta(old, new, error):
    with pytest.raises(error, match=r"'b'|^a "):
        Delta.between(old, new)


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "unwritable",
    [np.zeros((4, 2), np.float32).T, torch.zeros(4, 2).T, read_only(np.zeros((2, 4), np.float32))],
    ids=["strided numpy", "strided torch", "read-only"],
)
def test_nothing_is_written_when_one_target_cannot_be_written_in_place(unwritable):
    old = {"a": np.zeros(3, np.float32), "b": np.zeros((2, 4), np.float32)}
    delta = Delta.between(old, {"a": np.ones(3, np.float32), "b": np.ones((2, 4), np.float32)})
    live = {"a": np.zeros(3, np.float32), "b": unwritable}
    with pytest.raises(ShapeMismatch, match="b: not contiguous, writable"):
        delta.apply_(live)
    assert not live["a"].any()
    assert as_bits(unwritable) == as_bits(old["b"])


def test_tied_weights_under_two_names_are_refused_rather_than_stepped_twice():
    shared = torch.zeros(3)
    old = {"embed": shared, "head": shared}
    delta = Delta.between(old, {"embed": torch.ones(3), "head": torch.ones(3)})
    with pytest.raises(ApplyError, match="embed and head are the same memory"):
        delta.apply_(old)
    assert not shared.any()
    Delta({"embed": delta["embed"]}).apply_(old)
    assert shared.tolist() == [1, 1, 1]


def test_a_tensor_delta_whose_parts_do_not_fit_is_refused():
    with pytest.raises(DtypeMismatch, match="increments of BF16 are uint16"):
        TensorDelta("BF16", (2,), None, np.zeros(2, np.uint32))
    with pytest.raises(ShapeMismatch, match="1 increments where 2 belong"):
        TensorDelta("BF16", (2,), None, np.zeros(1, np.uint16))
    with pytest.raises(ShapeMismatch, match="1 increments where 2 belong"):
        TensorDelta("BF16", (4,), np.array([0, 1]), np.ones(1, np.uint16))


def test_tensors_of_different_dtypes_or_shapes_do_not_fold():
    one = TensorDelta("BF16", (2,), np.array([0]), np.ones(1, np.uint16))
    with pytest.raises(DtypeMismatch):
        one + TensorDelta("F16", (2,), np.array([0]), np.ones(1, np.uint16))
    with pytest.raises(ShapeMismatch):
        one + TensorDelta("BF16", (3,), np.array([0]), np.ones(1, np.uint16))


def test_the_difference_of_a_model_costs_memory_for_its_changes_not_for_the_model():
    rng = np.random.default_rng(0)
    old = {f"w{i}": Bits("BF16", (1 << 20,), rng.integers(0, 1 << 16, 1 << 20, np.uint16)) for i in range(8)}
    new = copies(old)
    for bits in new.values():
        bits.data[rng.choice(1 << 20, 10_000, replace=False)] += 1
    kernels.warm_up()
    tracemalloc.start()
    delta = Delta.between(old, new)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    one_tensor = 10_000 * (8 + unsigned("BF16").itemsize)
    assert delta.nbytes == 8 * one_tensor
    assert peak < delta.nbytes + one_tensor + 100_000
