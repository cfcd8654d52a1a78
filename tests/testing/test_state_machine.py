"""Any order of steps over a store breaks nothing, and planted faults are found. The first lines are all that a store
needs."""

import uuid

import planted
import pytest
from hypothesis import Phase, settings
from hypothesis.errors import HypothesisException

from deltawire import open_bucket
from deltawire.testing.state_machine import BucketMachine


class Memory(BucketMachine):
    def make_bucket(self, folder):
        return open_bucket(f"memory://{uuid.uuid4()}")


class Folder(BucketMachine):
    def make_bucket(self, folder):
        return open_bucket((folder / "bucket").as_uri(), create=True)


TestMemory, TestFolder = Memory.TestCase, Folder.TestCase
TestMemory.settings = settings(max_examples=12, stateful_step_count=25, deadline=None)
TestFolder.settings = settings(max_examples=6, stateful_step_count=25, deadline=None)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("machine", [Memory, Folder])
def test_long_programs_break_nothing(machine):
    case = machine.TestCase()
    type(case).settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
    case.runTest()


@pytest.mark.parametrize(
    "plant",
    [planted.head_before_the_commit, planted.a_failed_upload_is_forgotten, planted.the_floors_anchor_is_pruned],
)
def test_a_planted_fault_is_found(plant, monkeypatch):
    plant(monkeypatch)

    class Planted(Memory):
        pass

    case = Planted.TestCase()
    type(case).settings = settings(
        max_examples=60,
        stateful_step_count=30,
        deadline=None,
        phases=(Phase.generate,),
        derandomize=True,
        database=None,
    )
    with pytest.raises((Exception, BaseExceptionGroup)) as raised:
        case.runTest()
    assert not isinstance(raised.value, HypothesisException)


def test_a_machine_without_a_bucket_says_what_it_lacks(tmp_path):
    with pytest.raises(NotImplementedError, match="make_bucket"):
        BucketMachine().make_bucket(tmp_path)
