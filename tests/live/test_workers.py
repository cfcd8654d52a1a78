"""Several workers hold a model together: compared as one, updated as one, and never left at two versions."""

import itertools

import numpy as np
import pytest
import torch
from class_runs import deltas
from failing import failing
from hypothesis import given
from hypothesis import strategies as st
from small import COLUMNS, Shard, SmallRun
from stub_engine import StubEngine
from torch import nn
from waiting import await_staging

import deltawire as dw
from deltawire.errors import BadDigest, EngineError, EngineUnsupported, WrongBase
from deltawire.follow.follower import Follower
from deltawire.format import delta_file
from deltawire.live import answers, staging
from deltawire.live.coverage import Coverage
from deltawire.live.messages import Stage
from deltawire.live.transforms import AfterLoading
from deltawire.live.worker import LiveWorker
from deltawire.vllm.client import EngineClient
from deltawire.weights.boxes import Box
from deltawire.weights.digest import digest_at


@pytest.fixture
def run():
    with SmallRun() as run:
        yield run


@pytest.fixture
def shards(run):
    return [Shard(run.versions[0], rank) for rank in range(2)]


@pytest.fixture
def engine(shards):
    with StubEngine(*shards) as engine:
        yield engine


@pytest.fixture
def follower(run, engine):
    with Follower(run.url, EngineClient(engine.url)) as follower:
        yield follower


def assert_served(run, engine, shards, version):
    with EngineClient(engine.url) as client:
        report, status = client.audit(), client.status()
    assert dw.equal(Shard.served(shards), run.versions[version])
    assert torch.equal(shards[1].v.cpu(), run.versions[version]["v"])
    assert (report.position.version, report.mismatched, report.workers) == (version, [], 2)
    assert report.digests == {name: f"{value:016x}" for name, value in dw.digest(run.versions[version]).items()}
    assert (status.position.version, status.torn, status.quarantined) == (version, False, False)
    assert engine.weight_version == f"{run.publisher.position.run}:{version}"
    assert (engine.paused, engine.session_open) == (False, False)


@pytest.mark.usefixtures("held_on")
def test_workers_are_brought_from_version_to_version_together(run, engine, shards, follower):
    assert follower.step() is None
    assert_served(run, engine, shards, 0)
    for version in range(1, 4):
        run.publish(a=1, b=-1, v=1)
        assert follower.step().from_version == version - 1
        assert_served(run, engine, shards, version)


def test_workers_that_hold_parts_of_tiles_reach_a_delta_another_way_and_have_the_trainer_write_what_they_read():
    with SmallRun(codec="class") as run:
        shards = [Shard(run.versions[0], rank) for rank in range(2)]
        with StubEngine(*shards) as engine, Follower(run.url, EngineClient(engine.url)) as follower:
            follower.step()
            assert (follower.beats.codecs, follower.beats.cuts) == (("subset", "gap"), {"a": (4, 0), "b": (4, 0)})
            run.publish(a=1, b=-1, v=1)
            assert follower.step().from_version is None
            assert_served(run, engine, shards, 1)
            follower.beats.write(run.publisher.position)
            run.publisher.close(10)
            run.publisher = dw.Publisher(dw.open_bucket(run.url), codec="class")
            run.publish(a=1, b=-1, v=1)
            assert follower.step().from_version == 1
            assert_served(run, engine, shards, 2)
        found = [delta_file.read_header(data).encodings for _, data in sorted(deltas(run.publisher.bucket).items())]
        assert found == [("class", "class", "class"), ("subset", "subset", "class")]


class Halves(nn.Module):
    """One worker that holds `a` as two parameters: its left and its right columns."""

    def __init__(self, weights):
        super().__init__()
        self.left, self.right = (nn.Parameter(half.bfloat16().clone(), False) for half in weights["a"].chunk(2, 1))
        self.b, self.v = (nn.Parameter(weights[name].bfloat16(), False) for name in "bv")

    def load_weights(self, weights):
        for name, tensor in weights:
            if name == "a":
                self.left.data.copy_(tensor[:, : COLUMNS // 2])
                self.right.data.copy_(tensor[:, COLUMNS // 2 :])
            else:
                getattr(self, name).data.copy_(tensor)

    def served(self):
        return {"a": torch.cat([self.left, self.right], 1), "b": self.b.clone(), "v": self.v.clone()}


def test_a_worker_that_holds_a_tensor_in_two_places_reads_class_by_both_together():
    with SmallRun(codec="class") as run:
        model = Halves(run.versions[0])
        worker = LiveWorker(model, loading=AfterLoading())
        worker.attach(run.url)
        assert worker.status().codecs == ("subset", "class", "gap")
        for version in range(1, 4):
            run.publish(a=1e-2, b=-1e-2, v=1e-3)
            worker.commit({"bucket": run.url, "version": version})
            assert worker.status().error is None
            assert worker.status().applied.from_version == version - 1
            assert dw.equal(model.served(), run.versions[version])
        worker.close()


@pytest.mark.usefixtures("held_on")
def test_workers_that_stand_on_no_version_start_from_the_anchor(run, engine, shards, follower):
    run.publish(a=1)
    shards[0].ab.data[0, 0] = shards[1].v.data[3] = 42.0
    assert follower.step().from_version is None
    assert_served(run, engine, shards, 1)


@pytest.mark.usefixtures("held_on")
@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("where", ["write", "stage"])
def test_when_one_worker_fails_none_serves_the_new_version_and_the_next_update_works(
    run, engine, shards, follower, broken, where
):
    follower.step()
    run.publish(a=1, v=1)
    with (
        failing(engine.workers[broken], where, "this worker is out of order"),
        pytest.raises(EngineError, match=f"worker {broken}: this worker is out of order"),
    ):
        follower.step()
    assert_served(run, engine, shards, 0)
    assert follower.step().version == 1
    assert_served(run, engine, shards, 1)


@pytest.mark.parametrize("broken", [0, 1])
def test_a_worker_that_cannot_confirm_serves_what_the_others_do_and_takes_back_no_more_than_the_next_update(
    run, engine, shards, follower, broken
):
    follower.step()
    for version, moment in ((1, "confirm"), (2, "write")):
        run.publish(a=1, v=1)
        with failing(engine.workers[broken], moment, "this worker is out of order"):
            if moment == "confirm":
                assert follower.step().version == version
            else:
                with pytest.raises(EngineError, match=f"worker {broken}: this worker is out of order"):
                    follower.step()
        assert_served(run, engine, shards, 1)
    assert follower.step().version == 2
    assert_served(run, engine, shards, 2)


def test_a_follower_killed_between_the_writes_of_two_workers_leaves_nothing_that_the_next_does_not_mend(
    run, engine, shards, follower
):
    follower.step()
    run.publish(a=1, v=1)
    with EngineClient(engine.url) as client:
        client.start()
        client.pause("keep", clear_cache=True)
    target, lease = run.publisher.position, follower.engine.token
    answers.stage(engine.workers[0], Stage(run.url, 1, lease=lease))
    await_staging()
    engine.workers[0].update({"bucket": run.url, "version": 1, "root": target.root, "lease": lease})
    with EngineClient(engine.url) as client:
        assert client.status().torn
    with Follower(run.url, EngineClient(engine.url)) as second:
        assert second.step().version == 1
    assert_served(run, engine, shards, 1)


def test_a_failure_to_attach_on_one_worker_is_told_and_the_next_step_attaches_both(run, engine, shards):
    with Follower(run.url, EngineClient(engine.url)) as follower:
        with (
            failing(engine.workers[0], "attach", "no memory left"),
            pytest.raises(EngineError, match="worker 0: no memory left"),
        ):
            follower.step()
        follower.step()
    assert_served(run, engine, shards, 0)


@pytest.mark.parametrize("worker", [0, 1])
@pytest.mark.usefixtures("held_on")
def test_weights_that_drifted_on_one_worker_are_found_before_a_write_and_repaired(
    run, engine, shards, follower, worker
):
    follower.step()
    run.publish(v=1)
    shards[worker].v.data[1] = 42.0
    with pytest.raises(WrongBase, match="something else wrote to v"):
        follower.step()
    assert "/pause" not in engine.calls
    assert follower.step().version == 1
    assert_served(run, engine, shards, 1)


@pytest.mark.parametrize("worker", [0, 1])
def test_an_audit_names_a_copy_that_differs_and_the_follower_makes_it_anew(run, engine, shards, worker):
    problems = []
    with Follower(run.url, EngineClient(engine.url), audit_every=1, on_problem=problems.append) as follower:
        follower.step()
        run.publish(a=1)
        shards[worker].v.data[3] = 42.0
        assert follower.step().from_version is None  # the delta's own update, found wrong, then from the anchor
        assert "version 1: 1 tensors differ: v" in str(problems[0])
    assert_served(run, engine, shards, 1)


def test_a_change_that_does_not_lead_to_its_commit_is_refused_for_all(run, engine, shards, follower, monkeypatch):
    follower.step()
    run.publish(a=1)
    moved = staging.moved
    with monkeypatch.context() as faulty:
        faulty.setattr(staging, "moved", lambda *digests: moved(*digests) + 1)
        with pytest.raises(BadDigest, match="1 tensors would not match the commit: a"):
            follower.step()
    assert_served(run, engine, shards, 0)
    follower.step()
    assert_served(run, engine, shards, 1)


def test_a_plain_post_is_refused_because_nobody_compared_the_workers(run, engine, shards, follower):
    follower.step()
    follower.close()
    run.publish(a=1)
    for staged in (False, True):
        for worker in engine.workers:
            if staged:
                answers.stage(worker, Stage(run.url, 1))
                await_staging()
            worker.commit({"bucket": run.url, "version": 1, **({} if staged else {"root": "unvouched"})})
        with EngineClient(engine.url) as client:
            error = client.status().error
        assert error.kind == "EngineUnsupported"
        assert "only a follower can compare" in error.message
    assert_served(run, engine, shards, 0)


def test_a_tensor_that_no_worker_loads_whole_is_named(run):
    shards = [Shard(run.versions[0], rank, without="b" if rank else "") for rank in range(2)]
    with (
        StubEngine(*shards) as engine,
        Follower(run.url, EngineClient(engine.url)) as follower,
        pytest.raises(EngineUnsupported, match=r"b \(400 of its 800 elements arrive"),
    ):
        follower.step()


@given(rows=st.integers(1, 6), columns=st.integers(1, 6), data=st.data())
def test_however_a_matrix_is_cut_and_copied_its_digest_is_that_of_the_whole(rows, columns, data):
    whole = np.arange(1, 1 + rows * columns, dtype=np.uint16)
    across = data.draw(st.booleans())
    length = columns if across else rows
    cuts = sorted({0, length, *data.draw(st.lists(st.integers(0, length), max_size=3))})
    parts = [
        Box(first, (rows, last - first), (columns, 1))
        if across
        else Box(first * columns, ((last - first) * columns,), (1,))
        for first, last in itertools.pairwise(cuts)
    ]
    owners = [data.draw(st.sets(st.integers(0, 2), min_size=1)) for _ in parts]
    held = [[part for part, who in zip(parts, owners, strict=True) if rank in who] for rank in range(3)]

    def digest(part):
        index = np.indices(part.shape).reshape(len(part.shape), -1)
        positions = part.offset + sum(at * stride for at, stride in zip(index, part.strides, strict=True))
        return digest_at(positions.astype(np.int64), whole[positions])

    coverage = Coverage({"x": whole.size}, [{"x": part} for part in held])
    digests = [{"x": [digest(part) for part in mine]} for mine in held]
    assert coverage.digests(digests) == (dw.digest({"x": whole}), [])
    if copied := next((rank for rank in range(3) if any(rank in who and len(who) > 1 for who in owners)), None):
        index = next(n for n, part in enumerate(held[copied]) if len(owners[parts.index(part)]) > 1)
        digests[copied]["x"][index] ^= 1
        assert coverage.digests(digests)[1] == ["x"]
    if len(parts) > 1 and len(owners[0]) == 1:
        lacking = [[part for part in mine if part != parts[0]] for mine in held]
        with pytest.raises(EngineUnsupported, match="elements arrive"):
            Coverage({"x": whole.size}, [{"x": part} for part in lacking])
