"""The commands and code of docs/MONITORING.md run as they stand, but for the addresses of bucket, server and ports."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small import SmallRun
from stub_engine import StubEngine
from waiting import until

from deltawire.demo.processes import free_port

PAGE = Path(__file__).parents[2] / "docs" / "MONITORING.md"
FENCE = re.compile(r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
BLOCKS = [match.groupdict() for match in FENCE.finditer(PAGE.read_text())]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """What stands in the page, and what is here instead."""
    with SmallRun(tmp_path_factory.mktemp("runs") / "bucket") as run, StubEngine(run.model()) as engine:
        engine.faults["/version"] = lambda request: (200, {"version": "0.33.0"})
        ports = {port: str(free_port()) for port in ("8001", "8101", "8102")}
        yield {"hf://buckets/me/wordle": run.url, "http://127.0.0.1:8000": engine.url, **ports}, run


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_a_block_of_the_page_runs(block, shown):
    instead, run = shown
    text = block["text"]
    for there, here in instead.items():
        text = text.replace(there, here)
    if block["language"] == "python":
        names = {"model": Named(run.weights), "step": 2}
        exec(compile(text, "MONITORING.md", "exec"), names)
        names["port"].__exit__()
        return
    command = text.replace("deltawire ", f"{sys.executable} -m deltawire.cli ")
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": os.environ.copy()}
    words = re.search(r'until "([^"]+)"', block["mark"] or "")
    if words is None:
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", command], timeout=60, check=False, **options)
        assert done.returncode == 0 and done.stdout.strip(), done.stdout
        return
    with subprocess.Popen(["bash", "-c", f"exec {command}"], start_new_session=True, **options) as going:
        try:
            until(lambda: words[1] in going.stdout.readline(), unless=going.poll)
        finally:
            os.killpg(going.pid, signal.SIGTERM)


class Named:
    """What the page calls a model."""

    def __init__(self, weights):
        self._weights = weights

    def named_parameters(self):
        return self._weights.items()


def test_the_page_has_what_it_promises():
    assert {block["language"] for block in BLOCKS} == {"bash", "python"} and len(BLOCKS) >= 5
