"""The baseline and the change that no version covers yet move together, under whatever names tensors are given."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from runs import model, served
from strategies import versions

from deltawire.publish.baseline import Baseline
from deltawire.publish.tracker import ChangeTracker, Transition
from deltawire.weights.bits import Bits
from deltawire.weights.delta import Delta, TensorDelta
from deltawire.weights.digest import digest
from deltawire.weights.tensors import equal


def tracking(weights):
    return ChangeTracker(Transition(), Baseline.of(weights))


class Swept:
    """What a sweep of a device found, for baselines that are moved elsewhere."""

    def __init__(self, **moved):
        self.moved = moved

    def advance(self):
        return {}


def test_ranks_of_a_device_are_kept_only_of_a_change_that_was_found_in_one_piece():
    change = TensorDelta("BF16", (8,), np.array([3]), np.array([1], np.uint16))
    tracker = tracking({"w": Bits("BF16", (8,), np.zeros(8, np.uint16))})
    moved = SimpleNamespace(change=change, before=0, after=0, ranking="ranks")
    for expected in ({"w": "ranks"}, {}):
        tracker.take_swept(Swept(w=moved), {"w"})
        assert tracker.coded == expected
    tracker.cover()
    tracker.take_swept(Swept(w=moved), set())
    assert tracker.coded == {}


@given(versions(4))
def test_what_no_version_covers_is_the_difference_from_what_was_covered_last(chain):
    tracker, covered = tracking(chain[0]), chain[0]
    for number, version in enumerate(chain[1:]):
        for name, bits in version.items():
            tracker.take(name, bits, owned=True)
        assert equal(covered + Delta(tracker.uncovered), version)
        assert equal(tracker.baseline.as_mapping(), version)
        if number == 1:
            tracker.cover()
            covered = version


@given(versions(2))
def test_what_is_taken_back_or_belongs_to_another_rank_is_in_no_version(chain):
    tracker = tracking(chain[0])
    for name, bits in chain[1].items():
        tracker.take(name, bits, owned=True)
        tracker.take_back(name)
    assert equal(tracker.baseline.as_mapping(), chain[0])
    for name, bits in chain[1].items():
        tracker.take(name, bits, owned=False)
    assert equal(tracker.baseline.as_mapping(), chain[1])
    assert tracker.uncovered == {}
    assert tracker.seeded == digest(chain[0])


@pytest.mark.parametrize("both", [True, False], ids=["given by both names", "given by the further name only"])
def test_a_further_name_is_let_go_of_and_its_change_stays_with_the_tensor(both):
    tied, other = served(model())["embed.weight"], served(model(1))["embed.weight"]
    tracker = tracking({"embed": tied, "norm": tied, "head": tied})
    given = {"embed", "head"} if both else {"head"}
    for name in given:
        tracker.take(name, other, owned=True)
    tracker.merge({"head": "embed"}, given)
    assert [entry.name for entry in tracker.baseline.table(())] == ["embed", "norm"]
    assert tracker.baseline["embed"] == other
    assert tracker.baseline.digests == digest({"embed": other, "norm": tied})
    assert tracker.uncovered.keys() == {"embed"}
    assert equal({"embed": tied} + Delta(tracker.uncovered), {"embed": other})


def test_an_exception_among_statements_that_go_together_leaves_them_unfinished():
    transition = Transition()
    with transition:
        assert transition.unfinished
    assert not transition.unfinished
    with pytest.raises(TimeoutError), transition:
        raise TimeoutError
    assert transition.unfinished
