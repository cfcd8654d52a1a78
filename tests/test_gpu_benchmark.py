"""The benchmark of what a GPU does runs from end to end without one, and prints what it has when its time is over."""

import re
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
FEW = ("--device", "cpu", "--elements", "1e5", "--shares", "0.01")


def run(*arguments):
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *FEW, *arguments], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_row_stands_beside_its_bound_and_the_host_path():
    rows = [line.strip("| ").split(" | ") for line in run().splitlines() if line.startswith("| ")]
    assert {len(row) for row in rows[:2]} == {8}
    kinds = [re.split(r", ", row[0])[0] for row in rows[1:]]
    assert kinds == ["publish", "attach", "digest", "fetch and stage", "write", "encode", "decode", "publish", "rank"]
    for what, device, bound, times, host, *_ in rows[1:]:
        assert bound.endswith(" ms") and host.endswith(" ms") and float(times) > 0, what
        assert device.endswith(" ms") or what.startswith(("encode", "decode"))


def test_what_its_time_did_not_suffice_for_is_said():
    text = run("--seconds", "0")
    assert "Not measured, for its time was over: 100000 in torch.float32" in text
    assert "| publish" not in text
