"""The verbs that speak to a server: follow it once, pin it, audit it, and see where its weights live."""

import json

import pytest
from small import SmallRun
from stub_engine import StubEngine

import deltawire as dw
from verbs import run_verb


@pytest.fixture
def place(tmp_path):
    """A run of three versions, and a server on the first."""
    with SmallRun(tmp_path / "bucket") as run:
        run.publish(a=1)
        run.publish(b=1, v=1)
        with StubEngine(run.model(0)) as engine:
            yield run, engine


def told(*arguments, code=0):
    """What a verb says with --json."""
    return [json.loads(line) for line in run_verb(*arguments, "--json", code=code).stdout.splitlines()]


def test_a_server_is_followed_once_audited_pinned_and_seen_through(place):
    run, engine = place
    served = ("--engine", engine.url)
    (update,) = told("follow", "--bucket", run.url, *served, "--once")
    assert (update["event"], update["from_version"], update["version"]) == ("update", 0, 2)
    (audit,) = told("audit", *served)
    assert (audit["position"]["version"], audit["mismatched"]) == (2, [])
    assert audit["digests"] == {name: f"{value:016x}" for name, value in dw.digest(run.versions[2]).items()}
    (pinned,) = told("follow", "--bucket", run.url, *served, "--once", "--pin", 1)
    assert (pinned["from_version"], pinned["version"]) == (2, 1)
    (worker,) = told("inspect", *served)
    assert {box["parameter"] for boxes in worker["placement"].values() for box in boxes} == {"ab", "v"}


def test_an_audit_of_weights_that_drifted_names_them_and_ends_with_1(place):
    run, engine = place
    told("follow", "--bucket", run.url, "--engine", engine.url, "--once")
    engine.replica._model.v.data[3] = 42.0
    (audit,) = told("audit", "--engine", engine.url, code=1)
    assert audit["mismatched"] == ["v"]


def test_a_server_that_follows_nothing_yet_is_told_apart_from_one_without_weights(place):
    _, engine = place
    for verb in ("inspect", "audit"):
        done = run_verb(verb, "--engine", engine.url, code=1)
        assert done.stderr.startswith("deltawire: EngineUnsupported:") and "start `deltawire follow" in done.stderr
