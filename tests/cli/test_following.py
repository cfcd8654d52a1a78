"""`deltawire follow` with several servers: what each is told by, and the one port that shows them all."""

import json
import subprocess
import sys
from contextlib import ExitStack

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from small import SmallRun
from stub_engine import StubEngine
from typer.testing import CliRunner
from waiting import until

from deltawire.cli import app
from deltawire.cli.following import Following
from deltawire.errors import EngineError
from deltawire.follow.options import FollowOptions


@pytest.fixture
def place(tmp_path):
    """A run of two versions, and two servers on the first."""
    with SmallRun(tmp_path / "bucket") as run, ExitStack() as stack:
        engines = [stack.enter_context(StubEngine(run.model(0))) for _ in range(2)]
        run.publish(a=1)
        yield run, engines


def follow(run, engines, *options):
    names = [word for engine in engines for word in ("--engine", engine.url)]
    return CliRunner().invoke(app, ["follow", "--bucket", run.url, *names, "--once", "--json", *options])


def events(done):
    return [json.loads(line) for line in done.stdout.splitlines()]


def versions(engines):
    return [engine.weight_version.rpartition(":")[2] for engine in engines]


@pytest.mark.parametrize("options", [[], ["--all-or-nothing"]], ids=["apart", "all or nothing"])
def test_one_command_brings_several_servers_to_the_newest_version_and_tells_of_each(place, options):
    run, engines = place
    done = follow(run, engines, *options)
    assert done.exit_code == 0, done.output
    assert versions(engines) == ["1", "1"]
    told = [(event["event"], event.get("engine"), event.get("version")) for event in events(done)]
    assert sorted(told[:2]) == sorted(("following", engine.url, None) for engine in engines)
    assert sorted(told[2:]) == sorted(("update", engine.url, 1) for engine in engines)
    told = [(event["event"], event["version"]) for event in events(follow(run, engines, *options))[2:]]
    assert told == [("current", 1), ("current", 1)]


def test_all_or_nothing_ends_with_the_reason_when_one_cannot_follow(place):
    run, engines = place
    engines[1].fail("/update_weights", 500)
    done = follow(run, engines, "--all-or-nothing")
    assert done.exit_code == 1
    assert f"version 1 was taken back from all servers: {engines[1].url}" in str(done.exception)
    assert [engine.worker.status().position.version for engine in engines] == [0, 0]
    assert [engine.paused for engine in engines] == [False, False]


def test_options_that_several_servers_cannot_share_are_refused(place, tmp_path):
    run, engines = place
    for words, named in (
        (["--state", tmp_path / "file"], "--state"),
        (["--adapter", "x", "--adapter-folder", tmp_path], "--adapter-folder"),
        (["--adapter", "x", "--all-or-nothing"], "--all-or-nothing"),
    ):
        done = follow(run, engines, *map(str, words))
        assert (done.exit_code, f"Invalid value for {named}" in done.output) == (2, True)


def test_one_port_answers_for_each_server_and_for_all(place, capsys):
    run, engines = place
    engines[1].fail("/pause", 500)
    following = Following(run.url, FollowOptions(), as_json=True)
    with (
        following.of([engine.url for engine in engines], None, None, all_or_nothing=False),
        following.serving_health("0", None, None),
    ):
        port = json.loads(capsys.readouterr().out)["page"]
        with pytest.raises(EngineError, match="as planned"):
            following.run(once=True)
        whole = httpx.get(f"{port}health")
        assert (whole.status_code, whole.json()["ready"]) == (503, False)
        assert [one["ready"] for one in whole.json()["engines"].values()] == [True, False]
        assert [httpx.get(f"{port}health/{number}").status_code for number in range(3)] == [200, 503, 404]
        assert httpx.get(f"{port}live").status_code == 200
        families = text_string_to_metric_families(httpx.get(f"{port}metrics").text)
        served = {
            sample.labels["engine"]: sample.value
            for family in families
            for sample in family.samples
            if sample.name == "deltawire_follower_version"
        }
        assert served == {engines[0].url: 1, engines[1].url: 0}
        del engines[1].faults["/pause"]
        following.run(once=True)
        assert httpx.get(f"{port}health").status_code == 200
        names = {follower.replica for _, follower, _ in following._each}
        assert len(names) == 2
        until(lambda: rows(port) == dict.fromkeys(names, 1))


def test_a_signal_ends_the_process_and_every_server_keeps_what_it_serves(place):
    run, engines = place
    names = [word for engine in engines for word in ("--engine", engine.url)]
    command = [sys.executable, "-m", "deltawire.cli", "follow", "--bucket", run.url, *names, "--all-or-nothing"]
    with subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, text=True) as process:
        try:
            until(lambda: versions(engines) == ["1", "1"], unless=lambda: process.poll() is not None)
        finally:
            process.terminate()
        told, _ = process.communicate(timeout=60)
    *earlier, last = [json.loads(line) for line in told.splitlines()]
    assert last == {"event": "stopped", "by": "SIGTERM", "version": None}
    assert sorted(event["event"] for event in earlier) == ["following"] * 2 + ["update"] * 2
    assert process.returncode == 0
    assert versions(engines) == ["1", "1"]
    assert [engine.worker.status().lease.holder for engine in engines] == [None, None]


def rows(port):
    """Which version each replica on the page serves, once the bucket was looked at."""
    shown = httpx.get(f"{port}status.json").json().get("replicas", [])
    return {row["replica"]: row["version"] for row in shown}
