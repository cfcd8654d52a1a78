"""A seeded history finds nothing in deltawire, is the same whenever it is played, and finds faults that are planted."""

import os
import re
import subprocess
import sys

import planted
import pytest

from deltawire.buckets import Bucket
from deltawire.buckets.conformance import BucketTests
from deltawire.testing.simulation import main, play
from deltawire.testing.store import Clock, MemoryStore

SEEDS = 25
RARE = (planted.head_is_left_behind_by_a_prune, planted.one_look_at_the_newest_commit)
"""found by one seed in some dozens; each has a test of its own beside the code"""


class TestTheStore(BucketTests):
    @pytest.fixture
    def bucket(self) -> Bucket:
        return MemoryStore(clock=Clock())


def test_many_histories_break_nothing():
    broken = [outcome.problem for seed in range(SEEDS) if (outcome := play(seed)).problem]
    assert broken == []


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_a_thousand_histories_break_nothing():
    broken = [(seed, outcome.problem) for seed in range(SEEDS, 1000) if (outcome := play(seed)).problem]
    assert broken == []


def test_a_history_is_replayed_by_its_seed_in_another_process_too(capsys):
    first = play(7)
    assert first.trace == play(7).trace
    assert first.trace != play(8).trace
    assert len(first.trace) > 200
    other = subprocess.run(
        [sys.executable, "-m", "deltawire.testing.simulation", "7"],
        env={**os.environ, "PYTHONHASHSEED": "11", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    assert other.stdout.splitlines()[:-1] == [*first.trace]
    assert main(["7"]) == 0
    assert capsys.readouterr().out == other.stdout


def test_a_history_has_everything_in_it():
    """Over some seeds, every step is taken, everyone dies at some operation, and each kind of fault happens."""
    traces = "\n".join(line for seed in range(10) for line in play(seed).trace)
    for who in ("trainer", "compactor", "pruner", "follower-0"):
        assert f"{who} dies" in traces
    for step in ("publish", "upload", "break_off", "restart", "compact", "prune", "follow", "pin", "materialize"):
        assert re.search(rf"^ *[0-9.]+ +[a-z0-9-]+ {step}$", traces, re.M), step
    for fault in ("fail before", "fail after", "throttle", "truncate", "flip", "delay"):
        assert re.search(rf" {fault}$", traces, re.M), fault
    assert re.search(r"pruner delete .*/deltas/", traces)
    assert re.search(r"compactor put_new .*/folds/", traces)


def found_by(plant, seeds):
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        for seed in range(seeds):
            if (outcome := play(seed)).problem:
                return outcome
    return None


@pytest.mark.parametrize("plant", [plant for plant in planted.PLANTED if plant not in RARE])
def test_a_planted_fault_is_found(plant):
    assert found_by(plant, SEEDS) is not None


def test_a_planted_fault_is_replayed_by_its_seed():
    outcome = found_by(planted.a_failed_upload_is_forgotten, SEEDS)
    with pytest.MonkeyPatch.context() as patch:
        planted.a_failed_upload_is_forgotten(patch)
        again = play(outcome.seed)
    assert (again.problem, again.trace) == (outcome.problem, outcome.trace)
    assert play(outcome.seed).problem is None


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("plant", RARE)
def test_a_rare_planted_fault_is_found(plant):
    assert found_by(plant, 300) is not None
