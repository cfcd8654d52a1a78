"""What must hold when something is written: each predicate is silent on what is right, and names what is wrong."""

from types import SimpleNamespace

import pytest
from runs import chain_of_four, commits, edit, fresh, model, publishing

from deltawire.errors import BrokenInvariant
from deltawire.publish import invariants as of_publishers
from deltawire.publish import sender
from deltawire.publish.queue import Queue
from deltawire.runlog import invariants, writing
from deltawire.runlog.keys import commit_key
from deltawire.runlog.records import Head


@pytest.fixture(scope="module")
def chain():
    bucket, _ = chain_of_four()
    return commits(bucket)


def sizes(commit):
    return {payload.key: payload.size for payload in commit.payloads}


def test_a_record_refers_only_to_durable_payloads(chain):
    assert invariants.payloads_are_durable(chain[1], sizes(chain[1])) is None
    assert "not there" in invariants.payloads_are_durable(chain[1], {})
    assert "not there" in invariants.payloads_are_durable(chain[1], dict.fromkeys(sizes(chain[1]), 1))


def test_the_parent_is_exactly_the_newest_commit(chain):
    first, second, third, _ = chain
    assert invariants.parent_is(first, None) is None
    assert invariants.parent_is(third, second.position, third.parent_hash) is None
    assert "is the first" in invariants.parent_is(second, None)
    assert "the newest is" in invariants.parent_is(third, first.position)
    assert "another record" in invariants.parent_is(third, second.position, "0" * 64)


def test_head_names_a_commit_that_is_there(chain):
    key = commit_key(chain[1].run, 1)
    assert invariants.head_names_a_commit(Head(chain[1].run, 1, key), [key]) is None
    assert "not there" in invariants.head_names_a_commit(Head(chain[1].run, 1, key), [])
    assert "version 2" in invariants.head_names_a_commit(Head(chain[1].run, 2, key), [key])


@pytest.mark.parametrize(
    ("parents", "anchors", "wrong"),
    [
        ({}, [], None),
        ({0: None, 1: 0, 4: 1}, [0], None),
        ({4: 3, 5: 4}, [4], None),
        ({1: 0, 2: 1, 4: 2, 5: 4}, [4], None),  # below the oldest anchor: an interrupted prune
        ({1: 0, 2: 1}, [], "no anchor"),
        ({1: 0, 2: 1}, [7], "no anchor"),
        ({0: None, 1: 0, 3: 2}, [0], "version 3 continues 2"),
        ({0: None, 3: 2, 4: 3}, [0, 4], "version 3 continues 2"),
    ],
)
def test_every_kept_version_is_reachable_from_a_kept_anchor(parents, anchors, wrong):
    found = invariants.every_version_is_reachable(parents, anchors)
    assert (found is None) == (wrong is None)
    assert wrong is None or wrong in found


def test_a_broken_invariant_says_where_and_what_to_do():
    invariants.require(None, None, where="here")
    with pytest.raises(BrokenInvariant, match=r"^here: it is wrong. This is a fault of deltawire.* report"):
        invariants.require(None, "it is wrong", where="here")


def test_a_commit_that_does_not_continue_the_tip_is_not_sent(chain, monkeypatch):
    monkeypatch.setattr(writing, "append", lambda bucket, attempt: pytest.fail("it was written"))
    with pytest.raises(BrokenInvariant, match="is the first, and has a parent"):
        sender.commit(fresh(), SimpleNamespace(commit=chain[2]), None)
    with pytest.raises(BrokenInvariant, match="another record"):
        sender.commit(fresh(), SimpleNamespace(commit=chain[2]), sender.Tip(chain[1].position, "0" * 64))


def test_a_publisher_whose_queue_loses_a_version_stops_and_says_so(monkeypatch):
    add = Queue.add
    monkeypatch.setattr(Queue, "add", lambda self, captured: Queue() if captured.version == 2 else add(self, captured))
    weights = model()
    with pytest.raises(BrokenInvariant, match="and 2 was captured"), publishing(fresh()) as publisher:
        for seed in range(3):
            edit(weights, seed)
            publisher.publish(weights)
            publisher.flush(30)


def test_nothing_is_forgotten_between_the_commit_and_the_baseline(chain):
    held = [Held(2, 1), Held(5, 2)]
    assert of_publishers.nothing_is_forgotten(1, held, 6) is None
    assert of_publishers.nothing_is_forgotten(None, [Held(0, None)], 1) is None
    assert of_publishers.nothing_is_forgotten(None, [], 0) is None
    assert "continues 1" in of_publishers.nothing_is_forgotten(0, held, 6)
    assert "continues 2" in of_publishers.nothing_is_forgotten(1, held[1:], 6)
    assert "6 was captured" in of_publishers.nothing_is_forgotten(1, held, 7)


class Held:
    """What a captured version says of its place."""

    def __init__(self, version, parent):
        self.version, self.parent = version, parent
