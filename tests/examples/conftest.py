"""What the tests of the example share: a real environment server."""

import json
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def environment_url() -> Iterator[str]:
    """A Wordle server of three letters, four guesses and four secrets, on a free port."""
    command = [sys.executable, "-m", "examples.wordle.environment", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert select.select([server.stdout], [], [], 120.0)[0], "the environment server says nothing"
            ready = json.loads(server.stdout.readline())
            assert ready["event"] == "ready"
            yield ready["url"]
        finally:
            server.terminate()
