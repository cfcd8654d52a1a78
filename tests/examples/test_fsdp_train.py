"""The sharded example runs as its docstring says."""

import os
import subprocess
import sys
from pathlib import Path

from runs import commits, read_weights

import deltawire as dw

EXAMPLE = Path(__file__).parents[2] / "examples" / "fsdp" / "train.py"


def test_torchrun_publishes_every_step_of_a_sharded_model_and_a_second_job_continues(tmp_path):
    address = f"file://{tmp_path}/bucket"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for _ in range(2):
        done = subprocess.run(
            [*command, "--bucket", address, "--steps", "3"],
            capture_output=True,
            text=True,
            timeout=240,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stdout.count("changed") == 3
    found = commits(dw.open_bucket(address))
    assert {commit.run for commit in found} == {found[0].run}
    assert [found[-1].version, found[-1].step] == [5, 2]
    assert len(read_weights(dw.open_bucket(address))) == 6
