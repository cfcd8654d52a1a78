"""Who routes requests is told when a replica may have them: it serves a version, and one that is new enough."""

import httpx
import pytest
from small import Fused, SmallRun, make_weights
from stub_engine import StubEngine

from deltawire import ledger
from deltawire.errors import EngineError
from deltawire.vllm import health
from deltawire.vllm.follower import Follower
from deltawire.vllm.health import HealthServer


@pytest.fixture
def run():
    with SmallRun() as run:
        yield run


@pytest.fixture
def asked(run):
    """A follower of a server that stands on no version, and what its health endpoint says."""
    with (
        StubEngine(Fused(make_weights(seed=5))) as engine,
        Follower(run.url, engine.url) as follower,
        HealthServer(0, lambda: follower.standing.why_unready(1), follower.standing) as server,
    ):

        def ask():
            answer = httpx.get(server.url, timeout=10)
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
    with StubEngine(run.model(0)) as engine, Follower(run.url, engine.url) as follower:
        engine.fail("/start_weight_update", 500)
        with pytest.raises(EngineError):
            follower.step()
        assert follower.standing.why_unready(None) == "joining: version 0 is served, 2 behind"
        engine.faults.clear()
        follower.step()
        assert follower.standing.why_unready(None) is None
        run.publish(a=1)
        engine.fail("/start_weight_update", 500)
        with pytest.raises(EngineError):
            follower.step()
        assert follower.standing.why_unready(None) is None


def test_one_that_cannot_see_how_old_its_policy_is_is_unready(asked, monkeypatch):
    _, _, follower, ask = asked
    follower.step()
    monkeypatch.setattr(health, "BLIND_AFTER", -1.0)
    assert ask() == (503, "neither bucket nor engine was reached for a minute")


def test_the_ledger_tells_lag_and_what_the_last_audit_found(run):
    with (
        StubEngine(run.model()) as engine,
        Follower(run.url, engine.url, audit_every=1, replica="one") as follower,
    ):
        follower.step()
        run.publish(a=1)
        follower.step()
        follower._beat()
    ((_, beat),) = ledger.read_all(run.publisher.bucket)
    assert (beat.version, beat.lag, beat.audit) == (1, 0, "version 1: equal")
