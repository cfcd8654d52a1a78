"""The kernels on a real GPU: the tests of tests/weights/device, with their tensors there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
FOLDER = Path(__file__).parents[1] / "weights" / "device"


@pytest.mark.parametrize(
    ("file", "which"),
    [("under_interpreter.py", []), ("test_sweeps.py", ["-k", "not interpreter"])],
    ids=["twins", "host"],
)
def test_every_sweep_gives_what_its_twin_gives(file, which, device):
    """Processes of their own: Triton reads TRITON_INTERPRET, which a CPU needs, when it is imported."""
    environment = {**os.environ, "DELTAWIRE_TEST_DEVICE": device, "TRITON_INTERPRET": str(int(device == "cpu"))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", str(FOLDER / file)]
    done = subprocess.run([*command, *which], env=environment, capture_output=True, text=True, timeout=590, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
