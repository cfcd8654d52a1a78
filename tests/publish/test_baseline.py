"""The copy that new weights are compared with: it moves by deltas, its digests with it."""

import numpy as np
import pytest
from hypothesis import given
from strategies import versions

from deltawire.errors import DtypeMismatch, ShapeMismatch, UnknownTensor
from deltawire.publish.baseline import Baseline
from deltawire.weights.bits import Bits
from deltawire.weights.boxes import Box
from deltawire.weights.digest import digest
from deltawire.weights.table import TensorEntry
from deltawire.weights.tensors import as_bits, equal


def seeded(weights):
    baseline = Baseline()
    for name, bits in weights.items():
        baseline.seed(name, bits)
    return baseline


@given(versions(3))
def test_a_baseline_and_its_digests_follow_every_change(chain):
    baseline = seeded(chain[0])
    for version in chain[1:]:
        for name, bits in version.items():
            baseline.advance(name, baseline.compare(name, bits))
        assert equal(baseline.as_mapping(), version)
        assert baseline.digests == digest(version)


@given(versions(2))
def test_comparing_moves_nothing(chain):
    baseline = seeded(chain[0])
    for name, bits in chain[1].items():
        baseline.compare(name, bits)
    assert equal(baseline.as_mapping(), chain[0])
    assert baseline.digests == digest(chain[0])


def test_a_baseline_owns_its_memory():
    array = np.arange(4, dtype=np.uint16)
    baseline = seeded({"w": as_bits(array)})
    array[:] = 9
    assert baseline["w"].data.tolist() == [0, 1, 2, 3]


class Written(Bits):
    """Bits that another thread writes as soon as they are copied."""

    def copy(self):
        own = super().copy()
        self.data[:] += 1
        return own


def test_the_digest_is_that_of_what_the_baseline_holds_even_of_a_tensor_that_is_written_meanwhile():
    data = np.arange(4, dtype=np.uint16)
    for box in (None, Box.all_of((4,))):
        baseline = Baseline()
        baseline.seed("w", Written("BF16", (4,), data), box)
        assert baseline.digests == digest(baseline.as_mapping())


def test_an_unknown_name_is_refused_with_the_names_it_may_have_meant():
    baseline = seeded({"layers.0.weight": as_bits(np.zeros(3, np.float32)), "norm": as_bits(np.zeros(1, np.float32))})
    with pytest.raises(UnknownTensor, match=r"'layers\.0\.wieght'.*closest there: layers\.0\.weight"):
        baseline.compare("layers.0.wieght", as_bits(np.zeros(3, np.float32)))


def test_another_shape_or_dtype_is_refused():
    baseline = seeded({"w": as_bits(np.zeros((2, 3), np.float32))})
    with pytest.raises(ShapeMismatch, match=r"w: shape \[3, 2\], but this run has \[2, 3\]"):
        baseline.compare("w", as_bits(np.zeros((3, 2), np.float32)))
    with pytest.raises(DtypeMismatch, match=r"F32.*F16"):
        baseline.compare("w", as_bits(np.zeros((2, 3), np.float16)))


def test_the_table_lists_tensors_in_order_and_says_which_are_trained():
    baseline = seeded({"b": as_bits(np.zeros(3, np.float32)), "a": as_bits(np.zeros((), np.int8))})
    assert len(baseline) == 2
    assert baseline.table(["a"]) == (TensorEntry("b", "F32", (3,), False), TensorEntry("a", "I8", (), True))
