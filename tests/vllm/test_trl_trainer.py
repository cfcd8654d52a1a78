"""TRL's AsyncGRPOTrainer and rollout worker, a real vLLM server, a follower: what is served is what was trained."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean

import pytest
from following import following
from servers import save_checkpoint
from waiting import until

from deltawire.vllm.client import EngineClient

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).parents[2]
STEPS = 30
LIMIT = 200.0
"""seconds; learning took 107 to 121 on two cores under a load of 12"""


@contextmanager
def python(script, *arguments, folder):
    """A trainer's process, killed at the end with all it started; what it says is in trainer.log."""
    path = os.pathsep.join([str(ROOT), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "tests" / "support" / script), *map(str, arguments)]
    with (folder / "trainer.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_to_its_end(script, *arguments, folder):
    """What a trainer tells, as JSON, in the file that is its last argument."""
    with python(script, *arguments, "result.json", folder=folder) as process:
        code = process.wait(LIMIT)
    assert code == 0, (folder / "trainer.log").read_text(errors="replace")[-3000:]
    return json.loads((folder / "result.json").read_text())


def assert_serves(server, position, digests):
    """Live memory, digested anew, is the trainer's weights, and the server says so."""
    with EngineClient(server.url) as engine:
        audit = engine.audit()
        assert (audit.digests, audit.mismatched) == (digests, [])
        assert engine.weight_version() == str(audit.position) == position


def test_trl_learns_from_what_vllm_serves_and_at_the_end_both_hold_the_same_bits(server, tmp_path):
    save_checkpoint(tmp_path / "policy")
    url = (tmp_path / "bucket").as_uri()
    with following(url, server.url) as reports:
        told = run_to_its_end("immediate_eos.py", "policy", server.url, url, STEPS, folder=tmp_path)
    assert_serves(server, told["position"], told["digests"])
    rewards = told["rewards"]
    assert len(rewards) == STEPS
    assert told["logged"] == sorted(told["logged"]) and told["logged"][-1] >= STEPS - 1
    assert fmean(rewards[-5:]) > fmean(rewards[:5]) + 0.2, rewards
    assert None not in told["oldest"], "vLLM's middleware says which version made each sample"
    assert all(-1 <= step - oldest <= 3 for step, oldest in enumerate(told["oldest"])), told["oldest"]
    assert all(0 <= lag <= 3 for lag in told["lags"]), told["lags"]
    assert [report.version for report in reports][-STEPS:] == [*range(1, STEPS + 1)], "TRL waits for each"
    assert all(report.verified for report in reports)


def test_the_minimal_example_trains_and_the_server_ends_with_its_last_version(server, tmp_path):
    save_checkpoint(tmp_path / "policy")
    url = (tmp_path / "bucket").as_uri()
    with following(url, server.url) as reports:
        with python("minimal_on_cpu.py", "policy", url, server.url, 2, folder=tmp_path) as process:
            code = process.wait(LIMIT)
        assert code == 0, (tmp_path / "trainer.log").read_text(errors="replace")[-3000:]
    assert [report.version for report in reports] == [0, 1, 2]
    with EngineClient(server.url) as engine:
        assert engine.audit().mismatched == []


def test_a_trainer_killed_in_the_middle_starts_again_and_the_server_ends_with_its_weights(server, tmp_path):
    url = (tmp_path / "bucket").as_uri()
    with following(url, server.url) as reports:
        with python("trl_loop.py", url, "continue", 10**6, "none.json", folder=tmp_path) as killed:
            until(lambda: len(reports) >= 3 or killed.poll() is not None, seconds=LIMIT)
            assert killed.poll() is None, (tmp_path / "trainer.log").read_text(errors="replace")[-3000:]
        with EngineClient(server.url) as engine:
            assert engine.audit().mismatched == []
        for run in ("continue", "supersede"):
            told = run_to_its_end("trl_loop.py", url, run, 3, folder=tmp_path)
            assert_serves(server, told["position"], told["digests"])
    assert all(report.verified for report in reports)
    first, *runs = dict.fromkeys(report.run for report in reports)
    assert len(runs) == 1, "the killed run went on, then another took its place"
    served = [report.version for report in reports if report.run == first]
    assert served == sorted(served)
