"""Staging compares everything before anything is written; applying it puts all back when a write fails."""

import numpy as np
import pytest
from small import Fused, SmallRun, make_weights

import deltawire as dw
from deltawire.errors import Gap, OtherRun
from deltawire.live import changes, staging, writes
from deltawire.live.live_weights import LiveWeights
from deltawire.live.staging import Plan
from deltawire.live.transforms import AfterLoading
from deltawire.live.writes import Fill, Scatter, ScatterTogether
from deltawire.read.subscriber import Subscriber

pytestmark = pytest.mark.usefixtures("held_on")


@pytest.fixture
def run():
    with SmallRun() as run:
        yield run


def plan_for(run: SmallRun, model: Fused, since: int | None, version: int) -> tuple[LiveWeights, Plan]:
    """The plan from a version (or the anchor) to another, for a model whose digests are taken now."""
    subscriber = Subscriber(run.publisher.bucket)
    live = LiveWeights(model, subscriber.run.table, loading=AfterLoading())
    parent = None if since is None else subscriber.commits()[since].position
    try:
        return live, staging.stage(live, live.digests(), subscriber, parent, version)
    finally:
        subscriber.close()


def test_a_plan_leads_to_the_published_bits_and_writes_nothing_before_it_is_applied(run, held_on):
    model = run.model()
    run.weights["v"] += 1  # changes everywhere: a fill, not a scatter
    run.publish(a=1, b=-1)
    live, plan = plan_for(run, model, 0, 1)
    assert {type(write) for write in plan.writes} == ({Scatter, Fill} if held_on == "host" else {ScatterTogether})
    assert dw.equal(model.served(), run.versions[0])
    writes.apply(plan.writes)
    assert dw.equal(model.served(), run.versions[1])
    assert live.digests() == plan.digests
    assert {name: sum(parts) for name, parts in plan.digests.items()} == dw.digest(run.versions[1])
    writes.undo(plan.writes)
    assert dw.equal(model.served(), run.versions[0])


def test_a_dense_change_of_part_of_a_fused_parameter_fills_that_part_alone(run, monkeypatch):
    monkeypatch.setattr(changes, "FEW", 0)
    model = run.model()
    run.weights["b"] += 1
    run.publish()
    _, plan = plan_for(run, model, 0, 1)
    (fill,) = plan.writes
    assert fill.box.shape == (8, 100)
    writes.apply(plan.writes)
    assert dw.equal(model.served(), run.versions[1])


def test_several_commits_become_one_plan(run):
    model = run.model()
    for _ in range(4):
        run.publish(a=0.5)
    _, plan = plan_for(run, model, 0, 4)
    assert len(plan.writes) == 1
    writes.apply(plan.writes)
    assert dw.equal(model.served(), run.versions[4])


def test_commits_that_undo_each_other_leave_nothing_to_write(run):
    model = run.model()
    bits = run.weights["a"].clone()
    run.publish(a=0.5)
    run.weights["a"].copy_(bits)
    run.publish()
    _, plan = plan_for(run, model, 0, 2)
    assert (plan.writes, plan.changed) == ((), 0)
    assert plan.after.version == 2


def test_weights_that_are_no_committed_version_start_from_the_anchor(run):
    model = Fused(make_weights(seed=5))
    run.publish(b=3)
    _, plan = plan_for(run, model, None, 1)
    assert plan.since is None
    writes.apply(plan.writes)
    assert dw.equal(model.served(), run.versions[1])


def test_from_the_anchor_only_what_differs_is_written(run):
    model = run.model()
    model.ab.data[2, 5] = 42.0
    run.publish(b=3)
    _, plan = plan_for(run, model, None, 1)
    assert plan.changed == 1 + int(np.count_nonzero(run.versions[0]["b"] != run.versions[1]["b"]))
    writes.apply(plan.writes)
    assert dw.equal(model.served(), run.versions[1])


@pytest.mark.parametrize(("row", "seen"), [(1, True), (6, False)], ids=["where the delta writes", "beside it"])
def test_a_plans_digests_tell_weights_that_drifted_where_the_delta_touches_them(run, row, seen):
    """Elsewhere they are found by an audit: the check in O(changed) looks at touched elements alone."""
    model = run.model()
    subscriber = Subscriber(run.publisher.bucket)
    live = LiveWeights(model, subscriber.run.table, loading=AfterLoading())
    digests, since = live.digests(), subscriber.latest()
    run.publish(a=1)
    model.ab.data[row, 7] = 42.0
    plan = staging.stage(live, digests, subscriber, since, 1)
    assert (sum(plan.digests["a"]) != dw.digest(run.versions[1])["a"]) == seen
    writes.apply(plan.writes)
    assert sum(live.digests(["a"])["a"]) != dw.digest(run.versions[1])["a"]


def test_a_position_that_is_not_on_the_chain_is_refused(run):
    model = run.model()
    subscriber = Subscriber(run.publisher.bucket)
    live = LiveWeights(model, subscriber.run.table, loading=AfterLoading())
    with pytest.raises(Gap):
        staging.stage(live, live.digests(), subscriber, subscriber.latest(), 7)
    with SmallRun(seed=1) as other, pytest.raises(OtherRun):
        other.publish(a=1)
        staging.stage(live, live.digests(), Subscriber(other.publisher.bucket), subscriber.latest(), 1)


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_write_that_fails_half_way_puts_everything_back(run, broken, monkeypatch):
    monkeypatch.setattr(changes, "FEW", 0)
    model = run.model()
    run.weights["v"] += 1
    run.publish(a=1, b=1)
    live, plan = plan_for(run, model, 0, 1)
    digests = live.digests()

    class Half:
        """Writes, and then fails as a device does that runs out of memory."""

        def __init__(self, write):
            self._write = write

        def write(self):
            self._write.write()
            raise MemoryError("no room on the device")

        def undo(self):
            self._write.undo()

    failing = [Half(write) if at == broken % len(plan.writes) else write for at, write in enumerate(plan.writes)]
    with pytest.raises(MemoryError):
        writes.apply(failing)
    assert dw.equal(model.served(), run.versions[0])
    assert live.digests() == digests
