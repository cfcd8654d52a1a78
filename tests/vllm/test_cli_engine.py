"""The verbs that speak to a server: follow it once, pin it, audit it, and see where its weights live."""

import json
import subprocess
import sys

import pytest
from small import SmallRun
from stub_engine import StubEngine

import deltawire as dw


@pytest.fixture
def place(tmp_path):
    """A run of three versions, and a server on the first."""
    with SmallRun(tmp_path / "bucket") as run:
        run.publish(a=1)
        run.publish(b=1, v=1)
        with StubEngine(run.model(0)) as engine:
            yield run, engine


def run_verb(*arguments, code=0):
    command = [sys.executable, "-m", "deltawire.cli", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_server_is_followed_once_audited_pinned_and_seen_through(place):
    run, engine = place
    served = ("--engine", engine.url)
    (update,) = run_verb("follow", "--bucket", run.url, *served, "--once")
    assert (update["event"], update["from_version"], update["version"]) == ("update", 0, 2)
    (audit,) = run_verb("audit", *served)
    assert (audit["position"]["version"], audit["mismatched"]) == (2, [])
    assert audit["digests"] == {name: f"{value:016x}" for name, value in dw.digest(run.versions[2]).items()}
    (pinned,) = run_verb("follow", "--bucket", run.url, *served, "--once", "--pin", 1)
    assert (pinned["from_version"], pinned["version"]) == (2, 1)
    (worker,) = run_verb("inspect", *served)
    assert {box["parameter"] for boxes in worker["placement"].values() for box in boxes} == {"ab", "v"}


def test_an_audit_of_weights_that_drifted_names_them_and_ends_with_1(place):
    run, engine = place
    run_verb("follow", "--bucket", run.url, "--engine", engine.url, "--once")
    engine.replica._model.v.data[3] = 42.0
    (audit,) = run_verb("audit", "--engine", engine.url, code=1)
    assert audit["mismatched"] == ["v"]
