"""Benchmarks run where the tests are: what they import is there, and that of scale runs at sizes that take a moment."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["parameters", "--sizes", "1e5", "3e5"],
            ["98,304 parameters", "299,008 parameters", "update of a mirror: the last"],
        ),
        (["versions", "--most", "10"], ["version     10", "read: the last costs 1.00 times the first"]),
        (["tensors", "--most", "200"], ["200 tensors", "publish and flush: the last costs 1.00 times"]),
    ],
)
def test_that_of_scale_runs_from_end_to_end(arguments, says):
    command = [sys.executable, str(BENCHMARKS / "scale.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert [words for words in says if words not in done.stdout] == []


@pytest.mark.parametrize("name", ["vllm_pause.py", "host_cache.py"])
def test_one_that_uses_what_the_tests_share_finds_it(name):
    command = [sys.executable, str(BENCHMARKS / name), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
