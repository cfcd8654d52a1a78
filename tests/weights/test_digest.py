"""The digest adds up over changes and shards, sees order and place, and the root is a number that never moves."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from strategies import pairs

from deltawire.weights.bits import Bits, zeros
from deltawire.weights.delta import between_bits
from deltawire.weights.digest import digest, digest_at, digest_bits, moved, root


@dataclass(frozen=True)
class Row:
    name: str
    dtype: str
    shape: tuple[int, ...]


PINNED_TABLE = [Row("embed.weight", "BF16", (2, 3)), Row("norm.weight", "F32", ()), Row("empty", "F8_E4M3", (0, 4))]
PINNED = {
    "embed.weight": Bits("BF16", (2, 3), np.array([0, 0x8000, 0x7FC1, 0xFF80, 1, 0x3F80], np.uint16)),
    "norm.weight": Bits("F32", (), np.array([0x7F80_0001], np.uint32)),
    "empty": zeros("F8_E4M3", (0, 4)),
}
PINNED_ROOT = "bc5acc6d6067c7044abd460934b8a36a85d21e0160109616ced50eab0e82d495"
"""computed once, by `reference.root`"""


@given(pairs())
def test_the_digest_is_the_formula_in_the_specification(pair):
    old, _ = pair
    assert digest({"w": old}) == {"w": reference.digest(map(int, old.data))}


@given(pairs(), st.lists(st.integers(0, 2000), max_size=4))
def test_digests_of_shards_add_up_to_the_digest_of_the_whole(pair, cuts):
    data = pair[0].data
    bounds = sorted({0, data.size, *(min(cut, data.size) for cut in cuts)})
    parts = [digest_bits(data[a:b], a) for a, b in pairwise(bounds)]
    assert sum(parts) % 2**64 == digest_bits(data)


@given(pairs())
def test_a_digest_is_moved_by_the_touched_elements_alone(pair):
    old, new = pair
    delta = between_bits(old, new)
    positions, _ = delta.sparse()
    before, after = delta.apply_(old.copy().data)
    assert (before, after) == (digest_at(positions, old.data[positions]), digest_at(positions, new.data[positions]))
    assert moved(digest_bits(old.data), before, after) == digest_bits(new.data)
    assert moved(digest_bits(new.data), after, before) == digest_bits(old.data)


def test_order_place_and_length_all_matter():
    a, b = np.array([1, 2, 3], np.uint16), np.array([2, 1, 3], np.uint16)
    sums = [digest_bits(a), digest_bits(b), digest_bits(a, 1), digest_bits(np.append(a, np.uint16(0)))]
    assert len(set(sums)) == 4


def test_a_single_zero_element_has_a_digest_and_an_empty_tensor_has_none():
    assert digest_bits(np.zeros(1, np.uint16)) != 0
    assert digest_bits(np.zeros(0, np.uint16)) == 0


def test_the_root_is_stable():
    digests = digest(PINNED)
    rows = [(row.name, row.dtype, list(row.shape), digests[row.name]) for row in PINNED_TABLE]
    assert digests["embed.weight"] == reference.digest([0, 0x8000, 0x7FC1, 0xFF80, 1, 0x3F80])
    assert root(PINNED_TABLE, digests) == reference.root(rows) == PINNED_ROOT


@pytest.mark.parametrize(
    "other",
    [
        Row("embed.bias", "BF16", (2, 3)),
        Row("embed.weight", "F16", (2, 3)),
        Row("embed.weight", "BF16", (3, 2)),
        Row("embed.weight", "BF16", (6,)),
    ],
)
def test_the_root_sees_names_dtypes_shapes_and_digests(other):
    digests = {**digest(PINNED), "embed.bias": digest(PINNED)["embed.weight"]}
    assert root([other, *PINNED_TABLE[1:]], digests) != root(PINNED_TABLE, digests)
    assert root(PINNED_TABLE, {**digests, "empty": 1}) != root(PINNED_TABLE, digests)
    assert root(reversed(PINNED_TABLE), digests) != root(PINNED_TABLE, digests)


def test_a_root_with_a_digest_missing_is_refused():
    with pytest.raises(KeyError, match=r"norm\.weight"):
        root(PINNED_TABLE, {"embed.weight": 0, "empty": 0})
