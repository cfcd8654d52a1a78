"""Who routes requests is told when a replica may have them: its server answers, and serves a version new enough."""

import shutil

import httpx
import pytest
from small import Fused, SmallRun, make_weights
from stub_engine import StubEngine

from deltawire.errors import EngineError, NotFound
from deltawire.follow.follower import Follower
from deltawire.follow.health import Health, HealthServer
from deltawire.live.transforms import AfterLoading
from deltawire.live.worker import LiveWorker
from deltawire.runlog import heartbeats
from deltawire.vllm.client import EngineClient


@pytest.fixture
def asked(run):
    """A follower of a server that stands on no version, and what its health endpoint says."""
    with (
        StubEngine(Fused(make_weights(seed=5))) as engine,
        Follower(run.url, EngineClient(engine.url)) as follower,
        HealthServer(0, lambda: follower.health.why_unready(1), follower.health) as server,
    ):

        def ask():
            answer = httpx.get(server.url, timeout=60)
            assert answer.json()["ready"] == (answer.status_code == 200)
            return answer.status_code, answer.json()["reason"]

        yield run, engine, follower, ask


def test_a_joiner_is_ready_when_it_serves_and_unready_when_it_falls_too_far_behind(asked):
    run, engine, follower, ask = asked
    assert ask() == (503, "no version is served yet")
    follower.step()
    assert ask() == (200, None)
    for _ in range(2):
        run.publish(a=1)
    engine.fail("/start_weight_update", 500)
    with pytest.raises(EngineError):
        follower.step()
    assert ask() == (503, "version 0 is served, 2 behind; at most 1 may be")
    engine.faults.clear()
    follower.step()
    assert ask() == (200, None)


def test_a_late_replica_is_ready_only_when_it_is_current_however_old_a_policy_may_be(run):
    for _ in range(2):
        run.publish(a=1)
    with StubEngine(run.model(0)) as engine, Follower(run.url, EngineClient(engine.url)) as follower:
        engine.fail("/start_weight_update", 500)
        with pytest.raises(EngineError):
            follower.step()
        assert follower.health.why_unready(None) == "joining: version 0 is served, 2 behind"
        engine.faults.clear()
        follower.step()
        assert follower.health.why_unready(None) is None
        run.publish(a=1)
        engine.fail("/start_weight_update", 500)
        with pytest.raises(EngineError):
            follower.step()
        assert follower.health.why_unready(None) is None


def test_the_heartbeat_tells_lag_and_what_the_last_audit_found(run):
    with (
        StubEngine(run.model()) as engine,
        Follower(run.url, EngineClient(engine.url), audit_every=1, replica="one") as follower,
    ):
        follower.step()
        run.publish(a=1)
        follower.step()
        follower.beat()
    ((_, beat),) = heartbeats.read_all(run.publisher.bucket)
    assert (beat.version, beat.lag, beat.audit) == (1, 0, "version 1: equal")


@pytest.fixture
def place(tmp_path):
    """A server that follows a folder, by a clock that the test moves; and what its health says, by some limits."""
    now, limits = [1000.0], {}
    with (
        SmallRun(tmp_path / "bucket") as run,
        StubEngine(run.model()) as engine,
        Follower(run.url, EngineClient(engine.url)) as follower,
        HealthServer(0, lambda: follower.health.why_unready(**limits), follower.health) as server,
        httpx.Client(timeout=60) as http,
    ):
        follower.health.clock = lambda: now[0]
        follower.step()

        def ask(seconds, **given):
            now[0] += seconds
            limits.clear()
            limits.update(given)
            assert http.get(server.url.replace("/health", "/live")).status_code == 200
            answer = http.get(server.url)
            assert http.head(server.url).status_code == answer.status_code
            assert http.get(server.url + "z").status_code == 404
            return answer.status_code, answer.json()

        yield run, engine, follower, ask


def test_a_server_that_is_silent_for_a_minute_is_unready_though_the_bucket_answers(place):
    _, engine, follower, ask = place
    engine.stop()
    follower.listen()
    assert ask(59)[0] == 200
    follower.listen()
    status, said = ask(2)
    assert (status, said["ready"], said["reason"]) == (503, False, "the server has not answered for 61 s")


def test_a_bucket_that_is_gone_makes_nobody_unready_who_did_not_ask_for_fresh_versions(place, tmp_path):
    _, _, follower, ask = place
    assert ask(0)[1] | {"served": 0} == {
        "ready": True, "reason": None, "served": 0, "lag": 0, "age": 0.0, "problem": None,
    }  # fmt: skip
    (tmp_path / "bucket").rename(tmp_path / "elsewhere")
    with pytest.raises(NotFound):
        follower.step()
    for _ in range(3):
        ask(30)
        follower.listen()
    status, said = ask(0)
    assert (status, said["lag"], said["age"]) == (200, None, 90)
    assert said["problem"] == "the bucket has not answered for 90 s"
    status, said = ask(0, max_staleness=1)
    assert (status, said["reason"]) == (
        503, "how far version 0 is behind is not known: the bucket has not answered for 90 s",
    )  # fmt: skip
    assert ask(0, max_age=120)[0] == 200
    assert (
        ask(0, max_age=80)[1]["reason"]
        == "version 0 was last known to be the newest 90 s ago; at most 80 s ago will do"
    )
    (tmp_path / "elsewhere").rename(tmp_path / "bucket")
    follower.step()
    assert ask(0, max_staleness=0, max_age=1)[1]["age"] == 0


def test_a_bucket_that_was_emptied_is_no_version_that_is_current(place, tmp_path):
    _, _, follower, ask = place
    for path in (tmp_path / "bucket").iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(NotFound, match=r"has no HEAD\.json and no commits of run"):
        follower.step()
    assert ask(61)[1]["lag"] is None


def test_a_server_restarted_while_the_bucket_is_gone_is_unready(place, tmp_path):
    run, engine, follower, ask = place
    (tmp_path / "bucket").rename(tmp_path / "elsewhere")
    engine.worker = LiveWorker(run.model(), loading=AfterLoading())
    assert ask(10)[0] == 200
    follower.listen()
    assert ask(0)[0] == 503
    (tmp_path / "elsewhere").rename(tmp_path / "bucket")
    follower.step()
    assert ask(0)[0] == 200


def test_an_answer_that_was_overtaken_by_a_later_one_changes_nothing(place):
    _, _, follower, _ = place
    served, standing = follower.health.served, Health(clock=lambda: 7.0)
    standing.server_says(served)
    standing.server_says(None, asked=6.0)
    assert standing.served == served
