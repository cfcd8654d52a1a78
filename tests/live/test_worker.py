"""One worker's copy of the weights: where it stands, what it refuses, and that a failure leaves it where it was."""

import tempfile
import threading
from types import SimpleNamespace

import msgspec
import pytest
from runs import PATIENCE, replace_commit
from small import Fused, SmallRun, make_weights
from waiting import await_staging

import deltawire as dw
from deltawire.follow.status import audited
from deltawire.live import answers, staging, writes
from deltawire.live.live_weights import LiveWeights
from deltawire.live.messages import Accepted, Request, Stage, WorkerStatus
from deltawire.live.transforms import AfterLoading
from deltawire.live.worker import LiveWorker
from deltawire.vllm.hooks import worker_method
from deltawire.weights.device import sweeps
from deltawire.weights.digest import root

pytestmark = pytest.mark.usefixtures("held_on")


@pytest.fixture
def run():
    with SmallRun() as run:
        yield run


def worker_of(model: Fused) -> LiveWorker:
    return LiveWorker(model, loading=AfterLoading())


def attached(run: SmallRun, model: Fused) -> LiveWorker:
    worker = worker_of(model)
    worker.attach(run.url)
    assert status(worker).error is None
    return worker


def status(worker: LiveWorker) -> WorkerStatus:
    return worker.status()


def version_of(worker: LiveWorker) -> int | None:
    position = status(worker).position
    return position and position.version


def kind_of_error(worker: LiveWorker) -> str | None:
    error = status(worker).error
    return error and error.kind


def commit(worker: LiveWorker, run: SmallRun, version: int) -> str | None:
    """Ask for a version; the kind of error it recorded."""
    worker.commit({"bucket": run.url, "version": version})
    return kind_of_error(worker)


def stage(worker: LiveWorker, run: SmallRun, version: int) -> None:
    assert answers.stage(worker, Stage(run.url, version)).accepted
    await_staging()
    assert not status(worker).staging


def mismatched(worker: LiveWorker) -> list[str]:
    return audited([worker.live.audit(None)]).mismatched


def assert_repaired(worker: LiveWorker, run: SmallRun, version: int) -> None:
    """A worker in doubt is made right from the anchor by the next update, and claims a version again."""
    assert commit(worker, run, version) is None
    assert (version_of(worker), status(worker).quarantined) == (version, False)
    assert status(worker).applied.from_version is None
    assert mismatched(worker) == []


class Gate:
    """Holds `staging.stage` until it is opened, and counts its calls."""

    def __init__(self, monkeypatch) -> None:
        self.entered, self.open, self.calls = threading.Event(), threading.Event(), 0
        original = staging.stage

        def held(*arguments):
            self.calls += 1
            self.entered.set()
            assert self.open.wait(PATIENCE)
            return original(*arguments)

        monkeypatch.setattr(staging, "stage", held)


def test_the_live_digests_say_which_version_a_worker_stands_on(run):
    run.publish(a=1)
    run.publish(a=1)
    worker = attached(run, run.model(1))
    assert version_of(worker) == 1
    assert status(worker).attached == run.publisher.bucket.url
    assert status(worker).run == run.publisher.position.run


def test_a_staged_version_is_committed_without_being_prepared_again(run, monkeypatch):
    model = run.model()
    worker = attached(run, model)
    run.publish(a=1, v=1)
    gate = Gate(monkeypatch)
    gate.open.set()
    stage(worker, run, 1)
    assert dw.equal(model.served(), run.versions[0])
    assert status(worker).staged.version == 1
    assert commit(worker, run, 1) is None
    assert gate.calls == 1
    assert dw.equal(model.served(), run.versions[1])
    assert version_of(worker) == 1
    assert status(worker).applied.from_version == 0
    assert status(worker).staged is None


def test_a_commit_without_staging_attaches_and_prepares_by_itself(run):
    model = run.model()
    worker = worker_of(model)
    run.publish(b=1)
    assert commit(worker, run, 1) is None
    assert dw.equal(model.served(), run.versions[1])


def test_weights_that_are_no_version_are_brought_to_one_from_the_anchor(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = Fused(make_weights(seed=9))
    run.publish(b=1)
    worker = attached(run, model)
    assert version_of(worker) is None
    assert commit(worker, run, 1) is None
    assert dw.equal(model.served(), run.versions[1])
    assert version_of(worker) == 1
    assert status(worker).applied.from_version is None
    assert list(tmp_path.iterdir()) == []  # the anchor's files are gone again


def test_the_version_it_stands_on_is_no_work_and_an_older_one_is_reached_from_the_anchor(run):
    for _ in range(3):
        run.publish(a=1)
    model = run.model(3)
    worker = attached(run, model)
    assert commit(worker, run, 3) is None
    assert status(worker).applied is None
    stage(worker, run, 3)
    assert (kind_of_error(worker), status(worker).staged) == (None, None)
    assert commit(worker, run, 1) is None
    assert dw.equal(model.served(), run.versions[1])
    assert version_of(worker) == 1


@pytest.mark.parametrize(
    "request_",
    [{}, {"surprise": 1}, {"bucket": 3, "version": 1}, {"bucket": "memory://x", "version": "1"}, [], None, 7],
)
def test_a_request_that_makes_no_sense_is_recorded_and_nothing_is_raised(run, request_):
    worker = attached(run, run.model())
    worker.commit(request_)
    assert kind_of_error(worker) == "EngineError"
    assert version_of(worker) == 0


@pytest.mark.parametrize(
    ("url", "kind"),
    [("memory://nothing-is-here", "NotFound"), ("ftp://x", "BadUrl"), ("file:///no/such/folder", "NotFound")],
)
def test_a_bucket_that_is_not_there_is_recorded_and_the_old_one_kept(run, url, kind):
    worker = attached(run, run.model())
    worker.attach(url)
    assert kind_of_error(worker) == kind
    worker.commit({"bucket": url, "version": 1})
    assert kind_of_error(worker) == kind
    assert version_of(worker) == 0
    assert status(worker).attached == run.publisher.bucket.url


def test_a_version_that_was_never_committed_is_recorded_and_the_next_success_clears_it(run):
    model = run.model()
    worker = attached(run, model)
    assert commit(worker, run, 9) == "Gap"
    stage(worker, run, 9)
    assert kind_of_error(worker) == "Gap"
    assert dw.equal(model.served(), run.versions[0])
    run.publish(a=1)
    assert commit(worker, run, 1) is None
    assert version_of(worker) == 1


def test_while_a_version_is_being_staged_nothing_else_is_begun_and_nobody_waits(run, monkeypatch):
    model = run.model()
    worker = attached(run, model)
    run.publish(a=1)
    gate = Gate(monkeypatch)
    assert answers.stage(worker, Stage(run.url, 1)) == Accepted(True)
    assert gate.entered.wait(PATIENCE)
    assert status(worker).staging
    assert answers.stage(worker, Stage(run.url, 1)) == Accepted(False)
    assert commit(worker, run, 1) == "EngineUnavailable"
    worker.attach(run.url)
    assert kind_of_error(worker) == "EngineUnavailable"
    assert dw.equal(model.served(), run.versions[0])
    gate.open.set()
    await_staging()
    assert (kind_of_error(worker), status(worker).staged.version) == (None, 1)
    assert commit(worker, run, 1) is None
    assert dw.equal(model.served(), run.versions[1])


def test_a_plan_made_for_another_place_is_not_written(run):
    model = run.model()
    worker = attached(run, model)
    run.publish(a=1)
    run.publish(a=1)
    stage(worker, run, 2)
    assert commit(worker, run, 1) is None  # the staged plan led from 0 to 2
    assert commit(worker, run, 2) is None
    assert dw.equal(model.served(), run.versions[2])


def fail_in_the_middle(monkeypatch) -> None:
    """The second write of host memory fails, and the first of an accelerator's when it has written a part."""
    original, scattering, count = writes.Scatter.write, sweeps.scattering, [0]

    def failing(self):
        count[0] += 1
        original(self)
        if count[0] == 2:
            raise RuntimeError("the device is out of order")

    def made_ready(flats, counts, kind):
        put = scattering(flats, counts, kind)

        def halting(offsets, bits):
            count[0] += 1
            if count[0] == 1:
                sweeps.scatter(flats[:1], counts[:1], offsets[: counts[0]], bits[: counts[0]])
                raise RuntimeError("the device is out of order")
            put(offsets, bits)

        return halting

    monkeypatch.setattr(writes.Scatter, "write", failing)
    monkeypatch.setattr(sweeps, "scattering", made_ready)


def test_a_write_that_fails_in_the_middle_leaves_weights_digests_and_version(run, monkeypatch):
    model = run.model()
    worker = attached(run, model)
    run.publish(a=1, b=1)
    with monkeypatch.context() as broken:
        fail_in_the_middle(broken)
        assert commit(worker, run, 1) == "RuntimeError"
    assert dw.equal(model.served(), run.versions[0])
    assert (version_of(worker), status(worker).quarantined) == (0, False)
    assert mismatched(worker) == []
    assert commit(worker, run, 1) is None
    assert dw.equal(model.served(), run.versions[1])


def test_a_write_that_fails_and_cannot_be_taken_back_quarantines_the_worker(run, monkeypatch):
    worker = attached(run, run.model())
    run.publish(a=1, b=1)
    with monkeypatch.context() as broken:
        fail_in_the_middle(broken)
        for kind in (writes.Scatter, writes.ScatterTogether):
            broken.setattr(kind, "undo", lambda self: None)
        assert commit(worker, run, 1) == "RuntimeError"
    assert status(worker).quarantined
    assert version_of(worker) is None
    assert_repaired(worker, run, 1)


def out_of_order(*arguments):
    raise RuntimeError("the device is out of order")


def test_a_write_that_fails_where_memory_cannot_even_be_read_quarantines_the_worker(run, monkeypatch):
    worker = attached(run, run.model())
    run.publish(a=1, b=1)
    with monkeypatch.context() as broken:
        fail_in_the_middle(broken)
        for kind in (writes.Scatter, writes.ScatterTogether):
            broken.setattr(kind, "undo", out_of_order)
        broken.setattr(LiveWeights, "digests", out_of_order)
        assert commit(worker, run, 1) == "RuntimeError"
    assert (version_of(worker), status(worker).quarantined) == (None, True)
    assert_repaired(worker, run, 1)


def test_an_update_that_cannot_be_taken_back_quarantines_the_worker(run, monkeypatch):
    worker = attached(run, run.model())
    run.publish(a=1, b=1)
    assert commit(worker, run, 1) is None
    with monkeypatch.context() as broken:
        for kind in (writes.Scatter, writes.ScatterTogether):
            broken.setattr(kind, "undo", out_of_order)
        with pytest.raises(RuntimeError, match="out of order"):
            worker.live.take_back()
    assert (version_of(worker), status(worker).quarantined) == (None, True)
    assert_repaired(worker, run, 1)


def test_an_anchor_that_does_not_read_back_is_put_back(run, monkeypatch):
    model = Fused(make_weights(seed=9))
    before = model.served()
    worker = attached(run, model)
    with monkeypatch.context() as broken:
        broken.setattr(writes.Fill, "write", lambda self: self.memory.put(self.box, self.new ^ 1))
        assert commit(worker, run, 0) == "WrongBase"
    assert dw.equal(model.served(), before)
    assert (version_of(worker), status(worker).quarantined) == (None, False)


def test_weights_that_something_else_wrote_quarantine_the_worker_when_a_delta_touches_them(run):
    model = run.model()
    worker = attached(run, model)
    model.ab.data[1, 7] = 42.0
    run.publish(a=1)
    stage(worker, run, 1)
    assert kind_of_error(worker) == "WrongBase"
    assert status(worker).quarantined
    assert version_of(worker) is None
    assert_repaired(worker, run, 1)
    assert dw.equal(model.served(), run.versions[1])


def test_weights_that_something_else_wrote_are_found_by_an_audit(run):
    model = run.model()
    worker = attached(run, model)
    assert mismatched(worker) == []
    model.v.data[3] = 42.0
    answer = audited([worker.live.audit(None)])
    assert (answer.position.version, answer.mismatched) == (0, ["v"])
    assert status(worker).quarantined
    assert version_of(worker) is None
    run.publish(a=1)
    assert_repaired(worker, run, 1)


def test_a_delta_that_does_not_lead_where_its_commit_says_is_the_buckets_fault_and_quarantines_nobody(run):
    model = run.model()
    worker = attached(run, model)
    run.publish(a=1)
    with dw.Subscriber(run.publisher.bucket) as subscriber:
        lie = root(subscriber.run.table, dw.digest(run.versions[1]) | {"a": 7})
    forged = {"digests": {"a": f"{7:016x}"}, "root": lie}
    replace_commit(run.publisher.bucket, 1, lambda sound: msgspec.structs.replace(sound, **forged))
    assert commit(worker, run, 1) == "BadDigest"
    assert dw.equal(model.served(), run.versions[0])
    assert (version_of(worker), status(worker).quarantined) == (0, False)


def test_an_audit_against_another_bucket_names_what_differs_and_follows_nothing(run):
    model = run.model()
    worker = attached(run, model)
    with SmallRun(seed=1) as other:
        other.publish(a=1)
        answer = audited([worker.live.audit(other.url)])
        assert answer.position is None
        assert sorted(answer.mismatched) == ["a", "b", "v"]
    assert status(worker).attached == run.publisher.bucket.url
    assert (version_of(worker), status(worker).quarantined) == (0, False)


def test_an_audit_of_weights_that_are_no_version_compares_with_the_newest(run):
    model = run.model()
    model.v.data[3] = 42.0
    worker = attached(run, model)
    answer = audited([worker.live.audit(None)])
    assert (answer.position, answer.mismatched) == (None, ["v"])
    assert not status(worker).quarantined


def test_when_head_moves_to_another_run_attaching_again_follows_it(tmp_path):
    with SmallRun(tmp_path) as old:
        model = old.model()
        worker = attached(old, model)
        old.publish(a=1)
    with SmallRun(tmp_path, seed=1, run="supersede") as new:
        assert commit(worker, new, 0) is None  # still the old run, where it stands
        worker.attach(new.url)
        assert status(worker).run == new.publisher.position.run
        assert version_of(worker) is None
        assert commit(worker, new, 0) is None
        assert version_of(worker) == 0


def test_attaching_again_to_the_same_run_does_not_probe_again(run, monkeypatch):
    model = run.model()
    worker = attached(run, model)
    monkeypatch.setattr(model, "load_weights", lambda weights: pytest.fail("probed again"))
    worker.attach(run.url)
    worker.attach(run.url + "/")
    assert (kind_of_error(worker), version_of(worker)) == (None, 0)


def test_every_box_of_every_tensor_can_be_asked_for(run):
    placed = answers.placement(attached(run, run.model()), Request())
    assert msgspec.to_builtins(placed)["placement"]["b"] == [
        {
            "shape": (8, 100),
            "source_offset": 0,
            "source_strides": (100, 1),
            "parameter": "ab",
            "target_offset": 800,
            "target_strides": (100, 1),
            "shift": 0,
        }
    ]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"loading": None}, "loaded before the deltawire plugin"),
        ({"loading": AfterLoading({"ab": "rewritten after loading"})}, "a (ab was rewritten after loading)"),
        ({"loading": AfterLoading(), "copies": 2}, "2 data-parallel copies"),
    ],
)
def test_a_server_whose_layout_is_not_proven_is_refused(run, options, reason):
    worker = LiveWorker(run.model(), **options)
    worker.attach(run.url)
    assert kind_of_error(worker) == "EngineUnsupported"
    assert reason in status(worker).error.message


def test_closing_forgets_the_bucket_and_keeps_the_weights(run):
    model = run.model()
    worker = attached(run, model)
    worker.close()
    worker.close()
    assert status(worker).attached is None
    assert dw.equal(model.served(), run.versions[0])
    worker.attach(run.url)
    assert version_of(worker) == 0


def in_vllm(worker: LiveWorker | None) -> SimpleNamespace:
    """A worker of vLLM's, with our engine or without."""
    engine = SimpleNamespace(worker=worker) if worker else SimpleNamespace()
    return SimpleNamespace(weight_transfer_engine=engine, _weight_update_active=False, rank=0)


def test_aworker_method_echoes_the_nonce_and_never_raises(run):
    worker = attached(run, run.model())
    ask = worker_method("status")
    assert ask(in_vllm(worker), '{"nonce": "n1"}')["nonce"] == "n1"
    assert ask(in_vllm(worker), '{"nonce": "n1"}')["position"]["version"] == 0
    refused = worker_method("stage")(in_vllm(worker), '{"nonce": "n2", "version": 1}')
    assert (refused["nonce"], refused["refused"]["kind"]) == ("n2", "EngineError")
    for nonsense in ("", "[]", "3", "{"):
        assert worker_method("audit")(in_vllm(worker), nonsense)["refused"]
    assert ask(in_vllm(None), '{"nonce": "n3"}')["refused"]["kind"] == "EngineUnsupported"
    nobody = worker_method("audit")(in_vllm(worker_of(run.model())), '{"nonce": "n4"}')
    assert nobody["refused"]["kind"] == "EngineUnsupported"
    assert not status(worker).staging
