"""Killed with SIGKILL at every named step of publish, compact, mirror and prune, and started again: nothing is lost."""

import os
import signal
import subprocess
import sys

import pytest
from programs import program
from programs.killed_run import VERSIONS
from runs import edit, model, read_weights, served

from deltawire import Subscriber, materialize, open_bucket
from deltawire.format.checkpoint import Checkpoint
from deltawire.weights.tensors import equal

MATRIX = [
    *[(f"publish {step}", n) for step in ("payload", "commit", "head") for n in (1, 2, 6)],
    ("publish run", 1),
    *[(f"compact {step}", n) for step in ("payload", "manifest") for n in (1, 2, 3)],
    *[(f"mirror {step}", n) for step in ("journal", "apply", "sync", "mark", "clean") for n in (1, 2)],
    *[("prune batch", n) for n in (1, 2, 4)],
]


def play(url, folder, step="never", occurrence=1):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, program("killed_run"), url, str(folder), step, str(occurrence)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


def final():
    weights = model()
    for version in range(VERSIONS):
        edit(weights, version)
    return served(weights)


@pytest.mark.parametrize(("step", "occurrence"), MATRIX)
def test_killed_at_any_step_and_started_again_all_is_there(tmp_path, step, occurrence):
    kill_and_start_again((tmp_path / "bucket").as_uri(), tmp_path, step, occurrence)


@pytest.mark.parametrize(("step", "occurrence"), [case for case in MATRIX if not case[0].startswith("mirror")])
def test_killed_at_any_step_of_writing_to_s3_and_started_again_all_is_there(s3_url, tmp_path, step, occurrence):
    kill_and_start_again(s3_url, tmp_path, step, occurrence)


def kill_and_start_again(url, tmp_path, step, occurrence):
    folder = tmp_path / "mirror"
    killed = play(url, folder, step, occurrence)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = play(url, folder)
    assert again.returncode == 0, again.stderr
    bucket = open_bucket(url)
    assert equal(read_weights(bucket), final())
    with Subscriber(bucket) as subscriber:
        kept = subscriber.commits()
        assert [commit.step for commit in kept] == [commit.version for commit in kept]
        assert kept[-1].version == VERSIONS - 1
        payloads = {f"runs/{commit.run}/{payload.key}" for commit in kept[1:] for payload in commit.payloads}
    assert payloads <= {stat.key for stat in bucket.list("runs/")}
    out = materialize(bucket, tmp_path / "out").folder
    assert equal({name: Checkpoint(out)[name] for name in final()}, final())


def test_without_a_kill_the_same_script_leaves_the_newest_anchor_alone(tmp_path):
    url = (tmp_path / "bucket").as_uri()
    assert play(url, tmp_path / "mirror").returncode == 0
    with Subscriber(open_bucket(url)) as subscriber:
        assert subscriber.chain.versions() == [8]
