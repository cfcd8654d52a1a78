"""What waits for the uploader: no change is lost or doubled, and nothing folds into what is being sent."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from deltawire.format.codecs.ranking import Ranking, TileRanks
from deltawire.publish.pending import Captured
from deltawire.publish.queue import Queue
from deltawire.runlog.records import Run
from deltawire.weights.delta import Delta, TensorDelta
from deltawire.weights.table import TensorEntry

RUN = Run("0123456789abcdef", (TensorEntry("w", "BF16", (8,)),), 0.0)
NOTHING = Captured(RUN, 0, None, 1, Delta(), {"w": 0}, 0.0, None, {}, {})


def version(number, payloads=None):
    """A version that adds 1 to one element; version 0 is no delta."""
    if number == 0:
        return NOTHING
    change = TensorDelta("BF16", (8,), np.array([number % 8]), np.array([1], np.uint16))
    return replace(NOTHING, version=number, parent=number - 1, delta=Delta({"w": change}), payloads=payloads)


def covered(queue):
    """The version numbers that wait or are sent, each once."""
    return [n for captured in queue.held for n in range(captured.version - captured.versions + 1, captured.version + 1)]


@given(st.lists(st.sampled_from(["add", "freeze", "commit", "cut"]), max_size=40))
def test_every_version_waits_once_in_order_until_it_is_committed(verbs):
    queue, made, committed = Queue(), 0, 0
    for verb in verbs:
        if verb == "add":
            queue, made = queue.add(version(made)), made + 1
        elif verb == "freeze" and queue.frozen is None and queue.can_freeze(None):
            queue = queue.freeze()
        elif verb == "commit" and queue.frozen is not None:
            committed, queue = queue.frozen.version + 1, queue.commit()
        elif verb == "cut":
            queue = queue.cut_at(made - 1)
        assert covered(queue) == [*range(committed, made)]
        assert queue.backlog.versions == made - committed
        assert queue.is_empty == (made == committed)


def test_nothing_folds_into_the_first_version_the_one_being_sent_or_one_that_is_cut():
    queue = Queue().add(version(0)).add(version(1)).add(version(2))
    assert [captured.version for captured in queue.waiting] == [0, 2]
    queue = queue.freeze().commit().freeze().add(version(3))
    assert (queue.frozen.version, [captured.version for captured in queue.waiting]) == (2, [3])
    queue = queue.cut_at(3).add(version(4)).add(version(5))
    assert [captured.version for captured in queue.waiting] == [3, 5]


def test_a_version_that_will_wait_drops_the_bytes_made_for_it():
    sending = Queue().add(version(1)).freeze()
    assert Queue().add(version(1, {"deltas/x": b"bytes"})).waiting[0].payloads == {"deltas/x": b"bytes"}
    assert sending.add(version(2, {"deltas/x": b"bytes"})).waiting[0].payloads is None


def test_ranks_wait_for_the_next_upload_and_for_no_later_one():
    ranked = Ranking((1, 8), {0: TileRanks(np.zeros(16, np.int32), np.zeros(1, np.uint8), np.zeros(1, np.int32))}, {})
    next_up, later = (replace(version(number), coded={"w": ranked}) for number in (1, 2))
    assert Queue().add(next_up).waiting[0].codec == "class"
    assert Queue().add(version(1)).freeze().add(later).waiting[0].codec == "gap"
    assert Queue().add(version(1)).add(later).waiting[0].codec == "gap"
    backlog = Queue().add(next_up).backlog
    assert backlog.nbytes == next_up.delta.nbytes + ranked.nbytes
    assert backlog.closed_bytes == ranked.nbytes == 16 * 4 + 1 + 4


def test_a_rank_that_is_late_waits_for_the_version_it_must_end_at():
    queue = Queue().add(version(1))
    assert queue.can_freeze(None) and queue.can_freeze(1) and not queue.can_freeze(2)
    assert not Queue().can_freeze(None)
