"""The verbs that speak to a server: follow it once, pin it, audit it, and see where its weights live."""

import json
import shutil
import socket
import subprocess
import sys

import pytest
from small import SmallRun
from stub_engine import StubEngine
from verbs import run_verb

import deltawire as dw


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
    _, update = told("follow", "--bucket", run.url, *served, "--once")
    assert (update["event"], update["from_version"], update["version"]) == ("update", 0, 2)
    (audit,) = told("audit", *served)
    assert (audit["position"]["version"], audit["mismatched"]) == (2, [])
    assert audit["digests"] == {name: f"{value:016x}" for name, value in dw.digest(run.versions[2]).items()}
    _, pinned = told("follow", "--bucket", run.url, *served, "--once", "--pin", 1)
    assert (pinned["from_version"], pinned["version"]) == (2, 1)
    (worker,) = told("inspect", *served)
    assert {box["parameter"] for boxes in worker["placement"].values() for box in boxes} == {"ab", "v"}


def test_an_audit_of_weights_that_drifted_names_them_and_ends_with_1(place):
    run, engine = place
    told("follow", "--bucket", run.url, "--engine", engine.url, "--once")
    engine.worker.model.v.data[3] = 42.0
    (audit,) = told("audit", "--engine", engine.url, code=1)
    assert audit["mismatched"] == ["v"]


def test_a_server_that_follows_nothing_yet_is_told_apart_from_one_without_weights(place):
    _, engine = place
    for verb in ("inspect", "audit"):
        done = run_verb(verb, "--engine", engine.url, code=1)
        assert done.stderr.startswith("deltawire: EngineUnsupported:") and "start `deltawire follow" in done.stderr


def test_health_says_which_option_named_a_port_that_cannot_be_had(place):
    run, engine = place
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for address, says in [(f"127.0.0.1:{port}", f"port {port}: Address already in use"), ("here", "PORT")]:
            done = run_verb("follow", "--bucket", run.url, "--engine", engine.url, "--health", address, code=2)
            assert "--health" in done.stderr and says in " ".join(done.stderr.replace("│", " ").split())


def test_following_once_where_nothing_is_published_says_what_is_missing_and_fails(place, tmp_path):
    _, engine = place
    (tmp_path / "empty").mkdir()
    for name, says in [("empty", " has no HEAD.json: nothing is published there yet"), ("gone", ": no folder ")]:
        url = (tmp_path / name).as_uri()
        done = run_verb("follow", "--bucket", url, "--engine", engine.url, "--once", code=1)
        assert done.stdout == f"{engine.url} follows {url}\n"
        assert done.stderr.startswith(f"deltawire: NotFound: {url}{says}")


def test_a_follower_says_what_follows_what_that_it_waits_when_it_is_current_and_who_stopped_it(place, tmp_path):
    run, engine = place
    bucket = tmp_path / "later"
    command = [sys.executable, "-m", "deltawire.cli", "follow", "--bucket", bucket.as_uri(), "--engine", engine.url]
    with subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, text=True) as follower:
        try:
            said = (json.loads(line) for line in follower.stdout)
            assert next(said) == {"event": "following", "engine": engine.url, "bucket": bucket.as_uri(), "pin": None}
            waits = next(said)
            assert waits["event"] == "waiting" and waits["reason"].startswith(f"{bucket.as_uri()}: no folder ")
            shutil.copytree(tmp_path / "bucket", tmp_path / "copy")
            (tmp_path / "copy").rename(bucket)
            assert [next(said)["event"]] == ["update"]
            follower.terminate()
            stopped = next(said)
            assert (stopped["event"], stopped["by"], stopped["version"]) == ("stopped", "SIGTERM", 2)
            assert follower.wait(60) == 0
        finally:
            follower.kill()
    again = told("follow", "--bucket", run.url, "--engine", engine.url, "--once")
    assert [record["event"] for record in again] == ["following", "current"]
    assert not engine.paused
