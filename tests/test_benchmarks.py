"""Benchmarks run where the tests are: what they import is there, and that of scale runs at sizes that take a moment."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deltawire.format import container, delta_file
from deltawire.weights.bits import Bits
from deltawire.weights.delta import Delta

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


@pytest.fixture
def trace(tmp_path):
    """One step of a model of one tensor."""
    old = {"w": Bits("BF16", (64, 64), np.arange(4096, dtype=np.uint16))}
    new = {"w": old["w"].copy()}
    new["w"].data[::100] += 1
    (tmp_path / "base.safetensors").write_bytes(container.write(old, {}))
    (tmp_path / "step_000001.safetensors").write_bytes(delta_file.encode(Delta.between(old, new)))
    return tmp_path


@pytest.mark.parametrize(
    ("limits", "says"),
    [(["--seconds", "100"], "yes"), (["--seconds", "0.01"], "not finished in 0.01 s"), (["--memory", "0"], "failed")],
)
def test_that_of_codecs_says_of_each_whether_it_is_exact_or_why_it_was_not_measured(trace, limits, says):
    command = [sys.executable, str(BENCHMARKS / "codecs.py"), str(trace), "--ours", "--rounds", "1", *limits]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("deltawire ")]
    assert [line.split()[1] for line in rows] == list(delta_file.CODECS)
    assert [line for line in rows if says not in line] == []
