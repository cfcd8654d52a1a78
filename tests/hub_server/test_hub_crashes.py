"""The bucket server is killed with SIGKILL at every step of a publish, and while it is read: all arrives in the end."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hub_client import client_environment
from waiting import until

from deltawire.hub_server import HubProcess

TRAINER = """
import os, signal, sys, time
import numpy as np
import deltawire as dw
from deltawire.publish import publisher
from deltawire.runlog import writing
from deltawire.errors import DeltaWireError
publisher.FIRST_RETRY = 0.05
step, pid_file = sys.argv[1:]
append, killed = writing.append, []
def die(name):
    if name == step and version == 2 and not killed:
        killed.append(name)
        os.kill(int(open(pid_file).read()), signal.SIGKILL)
writing.append = lambda bucket, attempt: append(bucket, attempt, on_step=die)
bucket = dw.open_bucket("hf://buckets/me/run", create=True)
rng = np.random.default_rng(0)
weights = {name: rng.normal(0, 1, 5000).astype(np.float32) for name in "ab"}
if step == "fetch":
    version = -1
    with dw.Publisher(bucket) as pub:
        for number in range(3):
            weights["a"][:100 * number] += 1
            pub.publish(weights, step=number)
            pub.flush(60)
    os.kill(int(open(pid_file).read()), signal.SIGKILL)
    killed.append(step)
else:
    with dw.Publisher(bucket) as pub:
        for version in range(4):
            weights["a"][:100 * version] += 1
            pub.publish(weights, step=version)
            while True:
                try:
                    pub.flush(60)
                    break
                except DeltaWireError as error:
                    print("problem", type(error).__name__, flush=True)
assert killed, "the server was never killed"
while True:
    try:
        report = dw.materialize(bucket, sys.argv[2] + ".out")
        break
    except DeltaWireError as error:
        print("problem", type(error).__name__, flush=True)
        time.sleep(0.1)
from deltawire.format.checkpoint import Checkpoint
from deltawire.weights.tensors import cast, equal
assert equal(dict(Checkpoint(report.folder)), {name: cast(value, "BF16") for name, value in weights.items()})
print("equal", report.position.version)
"""


@pytest.mark.parametrize("step", ["payload", "commit", "head", "fetch"])
def test_a_server_killed_at_any_step_and_started_again_has_all_of_it(tmp_path: Path, step: str) -> None:
    server = HubProcess(tmp_path / "root").start()
    pid_file = tmp_path / "pid"
    pid_file.write_text(str(server.pid))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | client_environment(tmp_path)
    environment |= {"HF_ENDPOINT": server.url, "PYTHONPATH": os.pathsep.join(sys.path)}
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, step, str(pid_file)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        process = server._process
        assert process is not None
        until(lambda: process.poll() is not None or trainer.poll() is not None, seconds=60)
        assert process.poll() is not None, trainer.communicate()[0]
        assert process.returncode == -signal.SIGKILL
        port = int(server.url.rsplit(":", 1)[1])
        with HubProcess(tmp_path / "root", port=port):
            said, _ = trainer.communicate(timeout=120)
    finally:
        trainer.kill()
        trainer.wait()
        server.close()
    assert trainer.returncode == 0, said
    assert said.splitlines()[-1] == ("equal 2" if step == "fetch" else "equal 3")
