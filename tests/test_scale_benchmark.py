"""The benchmark of scale publishes, reads and compares what it says, at sizes that take a moment."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "scale.py"


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
def test_it_runs_from_end_to_end(arguments, says):
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert [words for words in says if words not in done.stdout] == []
