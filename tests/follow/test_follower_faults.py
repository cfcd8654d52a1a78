"""What a follower does when the server is not there, is not ours, or fails in the middle; against a stand-in."""

import itertools
import json
import shutil
import threading

import pytest
from blake3 import blake3
from running import Running, assert_at_rest, served
from small import Fused, SmallRun, make_weights
from stub_engine import StubEngine
from waiting import PATIENCE, until

import deltawire as dw
from deltawire.errors import (
    AccessRefused,
    BadDigest,
    BadSignature,
    EngineError,
    EngineUnavailable,
    EngineUnsupported,
    Gap,
    OtherRun,
    Quarantined,
    Unavailable,
    recorded_error,
)
from deltawire.follow.follower import Follower
from deltawire.follow.news import Current, Fetching
from deltawire.format import delta_file
from deltawire.live import model, staging, writes
from deltawire.live.transforms import AfterLoading
from deltawire.live.worker import LiveWorker
from deltawire.read import anchors
from deltawire.runlog.keys import derived_key
from deltawire.runlog.log import load_commit
from deltawire.runlog.records import Derived, Payload, write
from deltawire.runlog.signing import generate_key
from deltawire.vllm.client import EngineClient


@pytest.fixture
def engine(run):
    with StubEngine(run.model()) as engine:
        yield engine


@pytest.fixture
def follower(run, engine):
    with Follower(run.url, EngineClient(engine.url)) as follower:
        yield follower


def test_updates_go_stage_start_pause_update_finish_resume(run, engine, follower):
    run.publish(a=1)
    report = follower.step()
    assert (report.version, report.from_version, report.verified) == (1, 0, True)
    order = ["/start_weight_update", "/pause", "/update_weights", "/collective_rpc", "/finish_weight_update", "/resume"]
    assert engine.calls[-6:] == order
    assert_at_rest(engine, run, 1)


@pytest.mark.parametrize("pause", ["keep", "wait", "abort"])
@pytest.mark.parametrize("clear_cache", [True, False])
def test_what_becomes_of_requests_and_of_the_cache_is_what_was_asked_for(run, engine, pause, clear_cache):
    run.publish(a=1)
    with Follower(run.url, EngineClient(engine.url), pause=pause, clear_cache=clear_cache) as follower:
        follower.step()
    assert engine.queries["/pause"] == f"mode={pause}&clear_cache={str(clear_cache).lower()}"
    assert_at_rest(engine, run, 1)


def test_nobody_there_is_unavailable(run):
    engine = StubEngine(run.model())
    engine.stop()
    with (
        Follower(run.url, EngineClient(engine.url)) as follower,
        pytest.raises(EngineUnavailable, match="is vLLM running there"),
    ):
        follower.step()


@pytest.mark.parametrize(
    ("path", "status", "body", "kind", "says"),
    [
        ("/collective_rpc", 404, None, EngineUnsupported, "VLLM_SERVER_DEV_MODE=1"),
        ("/collective_rpc", 401, None, EngineUnsupported, "VLLM_API_KEY"),
        ("/collective_rpc", 500, None, EngineUnsupported, "weight-transfer-config"),
        ("/collective_rpc", 200, {"results": [{}, {}]}, Quarantined, "another question"),
        ("/collective_rpc", 200, {"results": [{"nonce": "another"}]}, Quarantined, "another question"),
        ("/collective_rpc", 200, {"results": [{"position": None}]}, Quarantined, "another question"),
        ("/collective_rpc", 200, {"results": ["text"]}, Quarantined, "another question"),
        ("/collective_rpc", 200, b"not json", Quarantined, "another question"),
        ("/init_weight_transfer_engine", 404, None, EngineUnsupported, "VLLM_SERVER_DEV_MODE=1"),
        ("/is_paused", 500, None, EngineError, "as planned"),
    ],
)
def test_a_server_that_is_not_ours_is_a_typed_error_with_the_next_step(
    engine, follower, path, status, body, kind, says
):
    engine.fail(path, status, body)
    with pytest.raises(kind, match=says):
        follower.step()
    assert "/start_weight_update" not in engine.calls


def test_a_server_with_another_backend_is_told_the_flag(run, engine, follower):
    engine.worker = None
    with pytest.raises(EngineUnsupported, match="weight-transfer-config"):
        follower.step()


def test_a_folder_named_from_here_reaches_the_server_by_its_whole_path(tmp_path, monkeypatch):
    """The server's working directory is another one."""
    monkeypatch.chdir(tmp_path)
    with SmallRun(tmp_path / "bucket") as run, StubEngine(run.model()) as engine:
        with Follower("./bucket", EngineClient(engine.url)) as follower:
            monkeypatch.chdir("/")
            follower.step()
        assert_at_rest(engine, run, 0)


def test_the_api_key_of_the_environment_is_sent_and_never_shown(run, engine, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "sk-very-secret")
    engine.fail("/collective_rpc", 401)
    with Follower(run.url, EngineClient(engine.url)) as follower, pytest.raises(EngineUnsupported) as caught:
        follower.step()
    assert engine.headers[-1]["Authorization"] == "Bearer sk-very-secret"
    assert "secret" not in str(caught.value)


def test_a_server_on_this_host_is_never_asked_through_a_proxy(run, engine, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with Follower(run.url, EngineClient(engine.url)) as follower:
        follower.step()
    assert_at_rest(engine, run, 0)


@pytest.mark.parametrize("path", ["/start_weight_update", "/pause", "/update_weights", "/finish_weight_update"])
@pytest.mark.parametrize("after", [False, True], ids=["before it acts", "after it acted"])
def test_a_failure_at_any_point_ends_session_and_pause_and_the_next_step_serves_the_version(
    run, engine, follower, path, after
):
    follower.step()
    run.publish(a=1)
    engine.fail(path, 500, after=after)
    with pytest.raises(EngineError, match="as planned"):
        follower.step()
    assert not engine.paused
    assert engine.session_open == (path == "/finish_weight_update" and not after)
    engine.faults.clear()
    follower.step()
    assert_at_rest(engine, run, 1)


def test_a_server_that_cannot_be_resumed_is_resumed_by_the_next_step(run, engine, follower):
    follower.step()
    run.publish(a=1)
    engine.fail("/resume", 500)
    with pytest.raises(EngineError):
        follower.step()
    assert engine.paused
    engine.faults.clear()
    assert follower.step() is None
    assert_at_rest(engine, run, 1)


def test_an_update_that_the_worker_refuses_is_resumed_and_keeps_the_old_label(run, engine, follower, monkeypatch):
    follower.step()
    run.publish(a=1)

    def broken(writes):
        raise MemoryError("no room on the device")

    with monkeypatch.context() as patched:
        patched.setattr(writes, "apply", broken)
        with pytest.raises(EngineError, match="MemoryError: no room"):
            follower.step()
    assert engine.calls[-2:] == ["/finish_weight_update", "/resume"]
    assert_at_rest(engine, run, 0)
    assert follower.step().version == 1
    assert_at_rest(engine, run, 1)


def test_an_update_that_cannot_be_staged_never_pauses_the_server(run, engine, follower, monkeypatch):
    follower.step()
    run.publish(a=1)

    def damaged(*arguments):
        raise BadDigest("runs/x/deltas/y: damaged")

    with monkeypatch.context() as patched:
        patched.setattr(staging, "stage", damaged)
        with pytest.raises(BadDigest, match="damaged"):
            follower.step()
    assert "/pause" not in engine.calls
    assert_at_rest(engine, run, 0)
    assert follower.step().version == 1


def test_a_worker_that_says_nothing_went_wrong_and_does_not_serve_the_version_is_quarantined(run, engine, follower):
    follower.step()
    run.publish(a=1)
    engine.fail("/update_weights", 200, {"message": "Weights updated"})
    with pytest.raises(Quarantined, match="without an error and does not serve it"):
        follower.step()
    assert_at_rest(engine, run, 0)


def test_a_server_whose_weights_drifted_stops_naming_a_version_and_is_repaired_from_the_bucket(run, engine, follower):
    follower.step()
    engine.worker.model.v.data[3] = 42.0
    with EngineClient(engine.url) as client:
        assert client.audit().mismatched == ["v"]
        assert client.status().quarantined
    engine.fail("/start_weight_update", 500)
    with pytest.raises(EngineError):
        follower.step()
    assert engine.weight_version == "unverified"
    engine.faults.clear()
    report = follower.step()
    assert (report.from_version, report.version, report.changed) == (None, 0, 1)
    assert_at_rest(engine, run, 0, label=str(run.publisher.position))


@pytest.mark.parametrize("reached", ["/start_weight_update", "/pause", "/update_weights", "/finish_weight_update"])
def test_whatever_a_killed_follower_had_reached_the_next_one_mends(run, engine, follower, reached):
    follower.step()
    run.publish(a=1)
    body = {"update_info": {"bucket": run.url, "version": 1}, "weight_version": str(run.publisher.position)}
    for path in ("/start_weight_update", "/pause", "/update_weights", "/finish_weight_update"):
        engine.do(path, body)
        if path == reached:
            break
    with Follower(run.url, EngineClient(engine.url)) as successor:
        successor.step()
        assert_at_rest(engine, run, 1)
        assert successor.step() is None


def test_a_follower_waits_for_what_another_had_staged_and_then_stages_its_own(run, engine, follower, monkeypatch):
    follower.step()
    run.publish(a=1)
    run.publish(a=1)
    original, entered, opened = staging.stage, threading.Event(), threading.Event()

    def held(*arguments):
        entered.set()
        assert opened.wait(PATIENCE)
        return original(*arguments)

    monkeypatch.setattr(staging, "stage", held)
    asked = {"bucket": run.url, "version": 1, "lease": follower.engine.token}
    engine.do("/collective_rpc", {"method": "deltawire_stage", "args": [json.dumps(asked)]})
    assert entered.wait(PATIENCE)
    asked = engine.calls.count("/collective_rpc")
    reports = []
    thread = threading.Thread(target=lambda: reports.append(follower.step()), daemon=True)
    thread.start()
    until(lambda: engine.calls.count("/collective_rpc") >= asked + 4, unless=lambda: not thread.is_alive())
    opened.set()
    thread.join(PATIENCE)
    assert (reports[0].from_version, reports[0].version) == (0, 2)
    assert_at_rest(engine, run, 2)


def test_a_server_restarted_on_older_weights_is_brought_back_and_named(run, engine, follower):
    run.publish(a=1)
    follower.step()
    engine.worker = LiveWorker(run.model(0), loading=AfterLoading())
    engine.weight_version = "default"
    report = follower.step()
    assert (report.from_version, report.version) == (0, 1)
    engine.worker = LiveWorker(run.model(1), loading=AfterLoading())
    engine.weight_version = "default"
    assert follower.step() is None
    assert_at_rest(engine, run, 1)


def test_keys_that_an_earlier_follower_gave_stay_with_the_server_and_the_next_is_told(tmp_path):
    key = generate_key(tmp_path / "trainer.key").public
    with (
        SmallRun() as unsigned,
        SmallRun(signing_key=tmp_path / "trainer.key") as signed,
        StubEngine(signed.model()) as engine,
    ):
        with Follower(signed.url, EngineClient(engine.url), trusted=[key]) as first:
            first.step()
        notes = []
        with Follower(signed.url, EngineClient(engine.url), on_news=notes.append) as second:
            second.step()
            second.step()
        assert [f"{engine.url} accepts only what the public keys signed" in told.note for told in notes] == [True]
        with (
            Follower(unsigned.url, EngineClient(engine.url)) as third,
            pytest.raises(BadSignature, match="an earlier follower gave it with --trust"),
        ):
            third.step()


def test_a_follower_of_a_bucket_where_nothing_is_published_changes_nothing(engine):
    with Follower("memory://empty-so-far", EngineClient(engine.url)) as follower:
        assert follower.step() is None
    assert set(engine.calls) == {"/collective_rpc", "/is_paused"}
    assert engine.worker.status().attached is None


def test_a_foreign_run_is_reported_and_followed_by_a_new_follower_only(tmp_path):
    with SmallRun(tmp_path / "bucket") as old, SmallRun(tmp_path / "other", seed=1) as new:
        pass
    with StubEngine(old.model()) as engine, Follower(old.url, EngineClient(engine.url)) as follower:
        follower.step()
        shutil.copytree(tmp_path / "other", tmp_path / "bucket", dirs_exist_ok=True)
        with pytest.raises(OtherRun):
            follower.step()
        assert_at_rest(engine, old, 0)
        with Follower(old.url, EngineClient(engine.url)) as successor:
            report = successor.step()
        assert (report.run, report.from_version, report.version) == (new.publisher.position.run, None, 0)
        assert_at_rest(engine, new, 0)


def test_a_run_that_supersedes_the_one_followed_is_followed_from_its_anchor(tmp_path):
    with SmallRun(tmp_path) as old:
        old.publish(a=1)
    with StubEngine(old.model()) as engine, Follower(old.url, EngineClient(engine.url)) as follower:
        follower.step()
        with SmallRun(tmp_path, seed=1, run="supersede") as new:
            assert follower.step().run == new.publisher.position.run
            assert_at_rest(engine, new, 0)
            new.publish(b=1)
            assert follower.step().from_version == 0
            assert_at_rest(engine, new, 1)


def test_a_pinned_version_is_reached_backwards_by_the_bytes_of_its_delta_and_left_again(tmp_path):
    with SmallRun(tmp_path) as run:
        run.publish(a=1)
        run.publish(b=1, v=1)
    sizes = [stat.size for stat in run.publisher.bucket.list("runs/") if "/deltas/" in stat.key]
    with StubEngine(run.model(2)) as engine:
        with Follower(run.url, EngineClient(engine.url)) as follower:
            follower.step()
            assert_at_rest(engine, run, 2)
        with Follower(run.url, EngineClient(engine.url), pin=1) as follower:
            report = follower.step()
            assert (report.from_version, report.version, report.wire_bytes) == (2, 1, sizes[1])
            assert_at_rest(engine, run, 1)
            assert follower.step() is None
        with Follower(run.url, EngineClient(engine.url)) as follower:
            assert follower.step().version == 2
            assert_at_rest(engine, run, 2)
        with (
            Follower(run.url, EngineClient(engine.url), pin=7) as follower,
            pytest.raises(Gap, match="never committed"),
        ):
            follower.step()


def test_what_passes_is_reported_once_while_it_lasts_and_then_the_follower_goes_on(run, engine):
    engine.fail("/is_paused", 500)
    with Running(run, engine) as running:
        assert running.problems.acquire(timeout=PATIENCE)
        seen = len(engine.calls)
        until(lambda: len(engine.calls) >= seen + 6, unless=lambda: running.ended_by is not None)
        assert len(running.told) == 1
        engine.faults.clear()
        run.publish(a=1)
        assert running.updates.acquire(timeout=PATIENCE)
    assert [type(error) for error in running.told] == [EngineError]
    assert running.ended_by is None
    assert_at_rest(engine, run, 1)


def test_a_server_that_dies_is_reported_and_waited_for(run):
    engine = StubEngine(run.model())
    try:
        with Running(run, engine) as running:
            run.publish(a=1)
            assert running.updates.acquire(timeout=PATIENCE)
            engine.stop()
            run.publish(a=1)
            assert running.problems.acquire(timeout=PATIENCE)
            assert running.goes_on
        assert isinstance(running.told[0], EngineUnavailable)
        assert running.ended_by is None
    finally:
        engine.worker.close()


def test_what_a_person_must_mend_ends_the_follower(run, engine):
    engine.worker = None
    with Running(run, engine) as running:
        running.join()
    assert isinstance(running.ended_by, EngineUnsupported)
    assert running.told == []


def test_closing_while_the_worker_stages_leaves_the_server_generating_the_old_version(run, engine, monkeypatch):
    entered, opened = threading.Event(), threading.Event()

    def held(*arguments):
        entered.set()
        assert opened.wait(PATIENCE)
        raise Unavailable("too late")

    with Running(run, engine) as running:
        monkeypatch.setattr(staging, "stage", held)
        run.publish(a=1)
        assert entered.wait(PATIENCE)
    opened.set()
    assert running.ended_by is None
    assert "/pause" not in engine.calls
    assert (served(engine), engine.session_open) == (0, False)


def test_an_error_recorded_by_a_worker_is_the_same_error_here():
    assert isinstance(recorded_error({"kind": "AccessRefused", "message": "no"}), AccessRefused)
    assert str(recorded_error({"kind": "KeyError", "message": "x"})) == "KeyError: x"
    for kind in ("DeltaWireError", "annotations", None, "__doc__"):
        assert isinstance(recorded_error({"kind": kind, "message": "x"}), dw.errors.DeltaWireError)


def test_what_still_stands_in_the_way_is_said_again_every_minute_with_its_age(run, engine):
    engine.fail("/is_paused", 500)
    ticks, ages = itertools.count(0, 7), []

    def hear(error):
        ages.append(follower.health.problem_age)
        if len(ages) == 3:
            follower.stop()

    with Follower(run.url, EngineClient(engine.url), poll=0.001, on_problem=hear) as follower:
        follower.health.clock = lambda: float(next(ticks))
        follower.run()
    assert ages[0] < 30 and all(60 <= later - earlier < 90 for earlier, later in itertools.pairwise(ages))


def test_a_follower_says_how_much_of_an_anchor_is_there_and_when_its_server_is_current(run, monkeypatch):
    """The worker fetches on its own thread; here it goes on once the follower has said what it saw."""
    heard, told, original = threading.Event(), [], anchors.download_verified

    def slowly(*arguments, **promised):
        original(*arguments, **promised)
        assert heard.wait(PATIENCE)

    def hear(news):
        told.append(news)
        heard.set()

    monkeypatch.setattr(anchors, "download_verified", slowly)
    with StubEngine(Fused(make_weights(seed=5))) as engine:
        with Follower(run.url, EngineClient(engine.url), on_news=hear) as follower:
            follower.step()
        (size,) = [stat.size for stat in run.publisher.bucket.list("runs/") if "/anchors/" in stat.key]
        assert told == [Fetching(run.publisher.position.run, 0, 0, size)]
        with Follower(
            run.url, EngineClient(engine.url), poll=0.01, on_news=lambda news: [hear(news), follower.stop()]
        ) as follower:
            follower.run()
    assert told[1:] == [Current(run.publisher.position.run, 0)]


def test_a_bucket_without_versions_is_waited_for_aloud(engine):
    said = []
    ticks = itertools.count(0, 7)

    def hear(news):
        said.append(news)
        if len(said) == 2:
            follower.stop()

    with Follower("memory://nothing-here", EngineClient(engine.url), poll=0.001, on_news=hear) as follower:
        follower.health.clock = lambda: float(next(ticks))
        follower.run()
    assert "nothing is published there yet" in said[0].reason
    assert 60 <= said[1].seconds - said[0].seconds < 90


def test_between_looks_as_many_seconds_pass_as_asked_for(run, engine):
    waits = []

    class Waited(threading.Event):
        def wait(self, timeout=None):
            waits.append(timeout)
            self.set()
            return True

    with Follower(run.url, EngineClient(engine.url), poll=60) as follower:
        follower.stopping = Waited()
        follower.run()
    assert [wait for wait in waits if wait > 1] == [60 - run.publisher.bucket.poll_seconds]  # others are for the server
    until(lambda: not engine.worker.status().staging)  # the follower left while the worker attached


def test_what_the_store_refuses_the_server_is_told_apart_from_what_it_refuses_the_follower(run, engine, monkeypatch):
    def refused(*arguments, **named):
        raise AccessRefused("hf://buckets/me/wordle: the token may not read")

    monkeypatch.setattr(model, "attach", refused)
    with Follower(run.url, EngineClient(engine.url)) as follower, pytest.raises(AccessRefused) as caught:
        follower.step()
    assert f"the token may not read (said by the server at {engine.url}, which reads the bucket itself" in str(
        caught.value
    )


@pytest.mark.parametrize("gone", [False, True], ids=["misspelt", "gone"])
def test_a_follower_never_makes_the_bucket_it_follows(gone, tmp_path, engine):
    with SmallRun(tmp_path / "bucket") as run:
        pass
    follower = Follower(
        run.url if gone else (tmp_path / "bukcet").as_uri(),
        EngineClient(engine.url),
        poll=0.01,
        on_problem=lambda error: follower.stop(),
        on_news=lambda news: follower.stop(),
    )
    with follower:
        if gone:
            follower.step()
            (tmp_path / "bucket").rename(tmp_path / "elsewhere")
        follower.run()
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere" if gone else "bucket"]


def test_closing_does_not_wait_for_a_worker_that_is_busy_for_ever(run, engine, follower):
    run.publish(a=1)
    follower.step()
    asked, ended = threading.Event(), []

    def busy(request):
        status, body = engine.do("/collective_rpc", request)
        if request["method"] == "deltawire_result":
            asked.set()
            body = {"results": [{**answer, "done": False, "found": None} for answer in body["results"]]}
        return status, body

    engine.faults["/collective_rpc"] = busy

    def audit():
        try:
            follower.audit()
        except EngineUnavailable as error:
            ended.append(error)

    waiting = threading.Thread(target=audit)
    waiting.start()
    assert asked.wait(PATIENCE)
    closing = threading.Thread(target=follower.close)
    closing.start()
    closing.join(PATIENCE)
    assert not closing.is_alive()
    waiting.join(PATIENCE)
    assert "closed while a worker was busy" in str(ended[0])


def test_a_base_that_was_named_for_one_bucket_is_not_used_for_another(run, engine, tmp_path):
    run.publish()
    with Follower(run.url, EngineClient(engine.url), base=tmp_path) as follower:
        follower.step()
    assert engine.worker.status().base == str(tmp_path)
    with SmallRun() as other:
        other.publish()
        with Follower(other.url, EngineClient(engine.url)) as follower:
            follower.step()
    assert engine.worker.status().base is None


def test_a_fold_that_lies_is_passed_over_for_the_commits_it_stands_for(run, engine, follower):
    run.publish(a=1)
    follower.step()
    for value in range(2, 7):
        run.publish(a=value)
    bucket = dw.open_bucket(run.url)
    start, end = (load_commit(bucket, run.publisher.position.run, version) for version in (1, 6))
    data = delta_file.encode(dw.Delta(), run=start.record.run, parent=1, version=6)
    payload = Payload("folds/step_000001-000006-0123456789ab.safetensors", len(data), blake3(data).hexdigest())
    lie = Derived(start.record.run, 6, 1, end.record.root, {}, (payload,), end.hash, start.hash)
    bucket.put(f"runs/{lie.run}/{payload.key}", data)
    bucket.put(derived_key(lie.run, 1, 6, lie.payloads), write(lie))
    assert follower.step().version == 6
    assert_at_rest(engine, run, 6)
