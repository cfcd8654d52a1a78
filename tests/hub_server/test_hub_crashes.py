"""The bucket server is killed with SIGKILL at every step of a publish, and while it is read: all arrives in the end."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hub_client import client_environment
from programs import program
from waiting import until

from deltawire.hub_server import HubProcess


@pytest.mark.parametrize("step", ["payload", "commit", "head", "fetch"])
def test_a_server_killed_at_any_step_and_started_again_has_all_of_it(tmp_path: Path, step: str) -> None:
    server = HubProcess(tmp_path / "root").start()
    pid_file = tmp_path / "pid"
    pid_file.write_text(str(server.pid))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | client_environment(tmp_path)
    environment |= {"HF_ENDPOINT": server.url, "PYTHONPATH": os.pathsep.join(sys.path)}
    trainer = subprocess.Popen(
        [sys.executable, program("trainer_killing_its_server"), step, str(pid_file)],
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
