"""A hint at the way, and an anchor's record, may be anyone's: they lead nobody astray, and stop nobody."""

import pytest
from blake3 import blake3
from runs import commits, edit, fresh, model, position, publish_all, publishing, served, table, updates

from attacks.hostile import encode
from deltawire import Subscriber, digest, materialize
from deltawire.format import delta_file
from deltawire.format.checkpoint import Checkpoint
from deltawire.runlog import log
from deltawire.runlog.keys import commit_key, derived_key, way_key
from deltawire.runlog.records import Derived, Link, Payload, Way, hash_of
from deltawire.upkeep import retention
from deltawire.upkeep.compactor import Compactor
from deltawire.weights.delta import Delta
from deltawire.weights.digest import root as root_of
from deltawire.weights.tensors import equal


@pytest.fixture
def chain():
    """Versions 0 to 7, and the bits at each."""
    bucket, weights, steps = fresh(), model(), []
    for step in range(8):
        edit(weights, step)
        steps.append({name: tensor.copy() for name, tensor in weights.items()})
    publish_all(bucket, *steps)
    return bucket, [served(step) for step in steps]


def leave(bucket, run, *links):
    """A way.json of these (start, end, size, kind of record)."""
    records = {"commit": lambda end: commit_key(run, end), "run": lambda end: f"runs/{run}/run.json"}
    records["nothing"] = lambda end: f"runs/{run}/derived/nothing-{end}.json"
    listed = tuple(Link(start, end, size, records[kind](end)) for start, end, size, kind in links)
    bucket.put(way_key(run), encode(Way(run, listed)))


@pytest.mark.parametrize(
    "links",
    [
        [(0, 7, 0, "commit"), (None, 7, 0, "commit")],  # commits that start elsewhere
        [(0, 7, 0, "run"), (None, 7, 0, "run")],
        [(None, 7, 0, "nothing"), (0, 7, 0, "nothing"), (0, 6, 1, "commit"), (None, 6, 1, "commit")],
        [(0, 1, -5000, "commit"), (None, 0, -5000, "commit")],  # a circle that gets ever cheaper
        [(None, 99, 0, "commit"), (99, 7, 0, "commit")],
    ],
    ids=["commits", "run.json", "nothing", "negative", "later"],
)
@pytest.mark.timeout(60)
def test_a_hint_that_lies_stops_no_reader(chain, tmp_path, links):
    bucket, steps = chain
    leave(bucket, commits(bucket)[0].run, *links)
    for start in (None, 0, 2):
        with Subscriber(bucket) as subscriber:
            change = subscriber.change(None if start is None else subscriber.position_at(start), 7)
            held = steps[start] if change.anchor is None else {name: change.anchor[name].copy() for name in steps[7]}
            assert equal(held + change.delta, steps[7])
    with Subscriber(bucket) as subscriber:
        assert subscriber.digests_at(7) == digest(steps[7])
        assert subscriber.position_of("0" * 64) is None
    assert [update.position.version for update in updates(bucket)] == list(range(8))
    assert equal(dict(Checkpoint(materialize(bucket, tmp_path / "out").folder)), steps[7])


def test_a_damaged_commit_behind_an_anchor_stops_no_joiner_whose_hint_is_older(chain, tmp_path):
    bucket, steps = chain
    run = commits(bucket)[0].run
    with Compactor(bucket, tmp_path / "mirror", levels=[], anchors=7) as compactor:
        compactor.step()
    bucket.put(commit_key(run, 4), b"{")
    leave(bucket, run, (None, 0, 0, "commit"))
    with Subscriber(bucket) as subscriber:
        change = subscriber.change(None, 7)
        assert equal({name: change.anchor[name].copy() for name in steps[7]} + change.delta, steps[7])
        assert subscriber.digests_at(7) == digest(steps[7])


def test_an_anchor_that_names_the_commit_and_holds_other_weights_is_passed_over(chain, tmp_path):
    bucket, steps = chain
    first, last = commits(bucket)[0], commits(bucket)[7]
    (payload,) = first.payloads
    theirs = digest(steps[0])
    lie = Derived(
        run=last.run,
        version=7,
        parent=None,
        root=root_of(table(steps[0]), theirs),
        digests={name: f"{value:016x}" for name, value in theirs.items()},
        payloads=(payload,),
        commit_hash=hash_of(bucket.get(commit_key(last.run, 7), limit=1 << 20)),
    )
    bucket.put(derived_key(last.run, None, 7, lie.payloads), encode(lie))
    for update in updates(bucket):
        assert update.position == position(bucket, update.position.version)
        assert update.digests == digest(steps[update.position.version])
    with Subscriber(bucket) as subscriber:
        change = subscriber.change(None, 7)
        assert equal({name: change.anchor[name].copy() for name in steps[7]} + change.delta, steps[7])
    assert equal(dict(Checkpoint(materialize(bucket, tmp_path / "out").folder)), steps[7])


def pruned(folder, length):
    """A run of so many versions of which nothing before the anchor at 4 is left: its bucket, the trainer's weights, and
    what a server holds at each version. The compactor's mirror is in `folder`."""
    bucket, weights, steps = fresh(), model(), []
    with publishing(bucket) as publisher:
        for step in range(length):
            edit(weights, step)
            publisher.publish(weights)
            publisher.flush(30)
            steps.append(served(weights))
            if step == 4:
                with Compactor(bucket, folder / "mirror", levels=[4], anchors=4) as compactor:
                    compactor.step()
    run = commits(bucket)[0].run
    retention.carry_out(bucket, retention.find_prunable(bucket, run, retention.Policy(anchors=1, hours=-1.0)))
    return bucket, weights, steps


def test_a_wrong_fold_does_not_take_the_only_anchor_of_a_pruned_run_with_it(tmp_path):
    bucket, _, steps = pruned(tmp_path, 9)
    run = commits(bucket)[0].run
    with Compactor(bucket, tmp_path / "mirror", levels=[4], anchors="never") as compactor:
        compactor.step()
    (fold,) = [stat.key for stat in bucket.list(f"runs/{run}/derived/fold-000004-000008-")]
    bucket.put(fold, b"{")
    with Subscriber(bucket) as subscriber:
        assert subscriber.digests_at(8) == digest(steps[8])
    assert equal(dict(Checkpoint(materialize(bucket, tmp_path / "out").folder)), steps[8])


def test_a_fold_that_lies_stops_neither_a_trainer_nor_a_folder_of_a_pruned_run(tmp_path):
    bucket, weights, steps = pruned(tmp_path, 10)
    run = commits(bucket)[0].run
    bucket.delete(way_key(run))
    materialize(bucket, tmp_path / "out", 4)
    start, end = (log.load_commit(bucket, run, version) for version in (4, 9))
    data = delta_file.encode(Delta(), run=run, parent=4, version=9)
    payload = Payload("folds/step_000004-000009-0123456789ab.safetensors", len(data), blake3(data).hexdigest())
    lie = Derived(run, 9, 4, end.record.root, {}, (payload,), end.hash, start.hash)
    bucket.put(f"runs/{run}/{payload.key}", data)
    bucket.put(derived_key(run, 4, 9, lie.payloads), encode(lie))
    assert equal(dict(Checkpoint(materialize(bucket, tmp_path / "out").folder)), steps[9])
    with publishing(bucket, resume="require") as publisher:
        assert publisher.position == end.record.position
        edit(weights, 10)
        publisher.publish(weights)
    assert equal(dict(Checkpoint(materialize(bucket, tmp_path / "new").folder)), served(weights))


def test_a_compactor_goes_on_beside_a_strangers_fold_of_one_version(chain, tmp_path):
    bucket, steps = chain
    run = commits(bucket)[0].run
    junk = Payload("folds/step_000002-000003-0123456789ab.safetensors", 0, blake3(b"").hexdigest())
    lie = Derived(run, 3, 2, commits(bucket)[3].root, {}, (junk,), "0" * 64, "0" * 64)
    bucket.put(derived_key(run, 2, 3, (junk,)), encode(lie))
    with Compactor(bucket, tmp_path / "mirror", levels=[4], anchors=7) as compactor:
        assert [(report.parent, report.version) for report in compactor.step()] == [(0, 4), (None, 7)]
    with Subscriber(bucket) as subscriber:
        change = subscriber.change(None, 7)
        assert equal({name: change.anchor[name].copy() for name in steps[7]} + change.delta, steps[7])
