"""What `deltawire status` says of a run: the trainer by its commits, each replica by its heartbeat."""

import json
import subprocess
import sys
import time

import msgspec
import pytest
from runs import edit, fresh, model, publishing
from verbs import run_verb

import deltawire as dw
from deltawire.buckets.base import Stat
from deltawire.buckets.wrappers import Counting
from deltawire.errors import NotFound
from deltawire.fleet.status import Watcher, replica_status
from deltawire.runlog import heartbeats
from deltawire.runlog.heartbeats import Heartbeat, TrainerBeat
from deltawire.runlog.keys import trainer_key
from deltawire.upkeep.compactor import Compactor

START = 1_000_000.0


def publish(bucket, number, *, seconds=60.0):
    """So many versions, one each so many seconds by the trainer's clock."""
    weights, now = model(), [START]
    with publishing(bucket, clock=lambda: now[0]) as publisher:
        for step in range(number):
            now[0] = START + seconds * step
            edit(weights, step)
            publisher.publish(weights, step=10 * step)
            publisher.flush(30)
        return publisher.position


def beat(bucket, name, run, version, **said):
    heartbeats.beat(bucket, Heartbeat(name, run, version, at=said.pop("at", time.time()), **said))


def look(bucket, now=START + 600):
    with Watcher(bucket, clock=lambda: now) as watcher:
        return watcher.look()


def test_the_trainer_is_seen_by_its_commits_alone():
    bucket = fresh()
    publish(bucket, 7)
    trainer = look(bucket, START + 360 + 25).trainer
    assert (trainer.version, trainer.step, trainer.age_s, trainer.versions_per_hour) == (6, 60, 25, 60)
    assert 0 < trainer.bytes_per_version < 2000
    assert (trainer.waiting, trainer.problem, trainer.signed) == (None, None, False)


def test_what_the_trainer_says_counts_until_it_has_gone_on():
    bucket = fresh()
    run = publish(bucket, 3).run

    def says(committed):
        said = TrainerBeat(
            run, version=5, committed=committed, waiting=3, waiting_bytes=9, problem="HTTP 503", at=START
        )
        bucket.put(trainer_key(run), msgspec.json.encode(said))
        trainer = look(bucket, START + 100).trainer
        return trainer.waiting, trainer.problem, trainer.heard_s

    assert says(2) == (3, "HTTP 503", 100)
    assert says(1) == (None, None, 100)


def test_a_replica_is_current_behind_unready_or_silent():
    bucket = fresh()
    run = publish(bucket, 7).run
    now = time.time()
    beat(bucket, "current", run, 6, pause_p50_ms=3.0, pause_p99_ms=9.5, fetched_bytes=70, codecs=("gap",), every=30)
    beat(bucket, "behind", run, 4, audit="version 4: equal")
    beat(bucket, "torn", run, 6, error="EngineError: no")
    beat(bucket, "hot", run, 6, unready="the server has not answered for 61 s")
    beat(bucket, "elsewhere", "f" * 16, 6)
    seen = {one.replica: one for one in look(bucket, now).replicas}
    assert {name: one.state for name, one in seen.items()} == {
        "behind": "behind", "current": "current", "elsewhere": "unready", "hot": "unready", "torn": "unready",
    }  # fmt: skip
    assert (seen["behind"].lag, seen["behind"].audit) == (2, "version 4: equal")
    assert seen["behind"].lag_s == pytest.approx(now - (START + 5 * 60))
    assert (seen["current"].lag, seen["current"].lag_s, seen["current"].codecs) == (0, 0.0, ("gap",))
    assert seen["elsewhere"].why == "it serves no version of this run"
    late = {one.replica: one for one in look(bucket, now + 91).replicas}
    assert late["current"].state == late["torn"].state == "silent"
    assert late["current"].why.startswith("no heartbeat for 9") and late["current"].why.endswith("every 30 s")


def test_one_wrong_clock_makes_nobody_silent():
    bucket = fresh()
    publish(bucket, 1)
    with dw.Subscriber(bucket) as subscriber:
        commits = subscriber.commits()
    for stamped, written in [(START, 0.0), (0.0, START), (START, START + 1e6), (START + 1e6, START)]:
        said = Heartbeat("a", commits[0].run, 0, at=written or None)
        assert replica_status(Stat("x", 1, "", stamped), said, commits, START + 10).state == "current"


def test_folds_and_anchors_that_lead_to_the_versions_shown_are_seen(tmp_path):
    bucket = fresh()
    publish(bucket, 9)
    with Compactor(bucket, tmp_path / "mirror", anchors=8) as compactor:
        compactor.step()
    links = {(link.start, link.end) for link in look(bucket).links}
    assert links == {(0, 4), (4, 8), (None, 8)}
    assert all(link.bytes > 0 for link in look(bucket).links)


def test_a_second_look_reads_only_what_changed():
    bucket = Counting(fresh())
    publish(bucket, 20)
    with Watcher(bucket) as watcher:
        watcher.look()
        before = bucket.traffic.calls
        watcher.look()
        assert bucket.traffic.calls - before <= 3  # HEAD, the list of heartbeats, what the trainer says


def test_a_watcher_goes_on_to_the_run_that_takes_the_place_of_the_one_it_saw():
    bucket = fresh()
    first = publish(bucket, 2).run
    with Watcher(bucket) as watcher:
        assert watcher.look().trainer.run == first
        with publishing(bucket, run="supersede") as publisher:
            publisher.publish(model(5))
            second = publisher.flush(30).run
        assert watcher.look().trainer.run == second != first


def test_status_is_told_as_text_and_as_json_and_a_hostile_heartbeat_stays_text(tmp_path):
    url = (tmp_path / "bucket").as_uri()
    bucket = dw.open_bucket(url, create=True)
    run = publish(bucket, 3).run
    beat(bucket, "vllm-1", run, 2, pause_p50_ms=3.25, pause_p99_ms=9.5)
    beat(bucket, "bad", run, 1, error="\x1b[2J[red]boom[/red]")
    text = run_verb("status", url).stdout
    assert "version 2 (step 20)" in text and "60.0 versions an hour" in text and "3.2/9.5 ms" in text
    assert "\x1b" not in text and "[red]boom[/red]" in text
    told = json.loads(run_verb("status", url, "--json").stdout)
    assert told["trainer"]["version"] == 2
    assert {one["replica"]: one["state"] for one in told["replicas"]} == {"bad": "unready", "vllm-1": "current"}


def test_status_of_what_is_no_run_says_so(tmp_path):
    assert "NotFound" in run_verb("status", (tmp_path / "none").as_uri(), code=1).stderr
    with Watcher(fresh()) as watcher, pytest.raises(NotFound):
        watcher.look()


def test_watching_tells_of_a_version_that_comes(tmp_path):
    url = (tmp_path / "bucket").as_uri()
    bucket = dw.open_bucket(url, create=True)
    publish(bucket, 1)
    command = [sys.executable, "-m", "deltawire.cli", "status", url, "--watch", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
        try:
            assert json.loads(watching.stdout.readline())["trainer"]["version"] == 0
            with publishing(bucket) as publisher:
                publisher.publish(model(3))
                publisher.flush(30)
            assert json.loads(watching.stdout.readline())["trainer"]["version"] == 1
        finally:
            watching.kill()
