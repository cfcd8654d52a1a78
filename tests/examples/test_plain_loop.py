"""The plain loop runs as its docstring says, and what it publishes is listed with its metrics."""

import subprocess
import sys
from pathlib import Path

from verbs import records, say

EXAMPLE = Path(__file__).parents[2] / "examples" / "plain_loop.py"


def test_a_plain_loop_publishes_each_step_with_its_loss(tmp_path):
    bucket = (tmp_path / "bucket").as_uri()
    command = [sys.executable, str(EXAMPLE), bucket]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("changed") == 10
    commits = records("log", bucket)
    assert commits[-1]["step"] == 9 and commits[-1]["metrics"]["loss"] > 0
    assert any("loss" in line for line in say("log", bucket).splitlines()[:3])
    (best,) = records("materialize", bucket, tmp_path / "out", "--version", "best:-loss")
    assert best["position"]["version"] in {commit["version"] for commit in commits}
