"""Four hosts that share nothing but a bucket server and the routes of rollouts and games, each link 100 Mbit/s."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest
from hosts import Network, Rule, network, why_not

from deltawire.demo.processes import Child, Children, Command

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
BITS_PER_SECOND = 100_000_000
BUCKET_PORT, PUBLIC_PORT, WEIGHT_PORT = 8100, 7860, 8000
"""of the bucket server; what a Space opens; where vLLM listens, on loopback"""
ALLOWED = (
    Rule("trainer", "bucket", BUCKET_PORT),
    Rule("engine", "bucket", BUCKET_PORT),
    Rule("trainer", "engine", PUBLIC_PORT),
    Rule("trainer", "environment", PUBLIC_PORT),
)
TOKEN, KEY = "hf_a_token_of_ada", "a key that rollouts name"


@dataclass(frozen=True)
class Place:
    """The hosts, with the bucket server running on one of them, and what starts processes on the others."""

    hosts: Network
    children: Children
    folder: Path

    def start(self, host: str, name: str, *command: str, lasting: bool = True, **environment: str) -> Child:
        """Run a command on a host, from the checkout; its process group's id will be in `name`.pid."""
        noted = ("bash", "-c", 'echo $$ > "$0"; exec "$@"', str(self.folder / f"{name}.pid"))
        arguments = self.hosts.inside(host, *noted, *command)
        told = self.environment(host) | environment
        return self.children.start(Command(name, arguments, told, ROOT, grace=20.0, lasting=lasting))

    def environment(self, host: str) -> dict[str, str]:
        """What a process on a host is told: nothing is shared by way of files, so caches are the host's own."""
        home = self.folder / host
        return {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "NO_PROXY": "*",
            "no_proxy": "*",
            "HF_ENDPOINT": f"http://{self.hosts['bucket']}:{BUCKET_PORT}",
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(home / "hf"),
            "HF_XET_CACHE": str(home / "xet"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_XET_CLIENT_RETRY_BASE_DELAY": "200ms",
            "VLLM_API_KEY": KEY,
        }

    def kill(self, child: Child) -> None:
        """End everything a command started, at once, as the loss of its host would."""
        os.killpg(int((self.folder / f"{child.name}.pid").read_text()), signal.SIGKILL)
        child.close()

    def popen(self, host: str, *command: str) -> "subprocess.Popen[str]":
        """A process on a host that the caller talks with, and ends."""
        return subprocess.Popen(
            self.hosts.inside(host, *command),
            cwd=ROOT,
            env=os.environ | self.environment(host),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, host: str, *command: str, timeout: float = 120.0) -> str:
        """What a command on a host prints."""
        inside, env = self.hosts.inside(host, *command), os.environ | self.environment(host)
        done = subprocess.run(inside, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def wait(self, child: Child, what: str, look: Callable[[], T | None], seconds: float = 240.0) -> T:
        """What `look` finds at last; a process that ended, or takes too long, fails with the end of its log."""
        deadline = time.monotonic() + seconds
        while (found := look()) is None:
            if child.code is not None or time.monotonic() > deadline:
                raise child.failed(f"({child.code}) did not {what} in {seconds:.0f} s")
            time.sleep(0.1)
        return found


@contextmanager
def places(folder: Path) -> Iterator[Place]:
    """The hosts and the bucket server, until this ends. Skips the test where there can be none."""
    if reason := why_not():
        pytest.skip(f"a network of hosts {reason}")
    users = folder / "users.json"
    users.write_text(json.dumps({"users": [{"name": "ada", "token": TOKEN}]}))
    with (
        network(["trainer", "engine", "environment", "bucket"], ALLOWED, f"{BITS_PER_SECOND}bit") as hosts,
        Children(folder / "logs") as children,
    ):
        made = Place(hosts, children, folder)
        words = ("serve", "--root", str(folder / "buckets"), "--users", str(users), "--host", "0.0.0.0")
        server = made.start("bucket", "bucket", "deltawire", *words, "--port", str(BUCKET_PORT), "--json")
        made.wait(server, "get ready", lambda: next(server.output.records(), None))
        yield made
