"""What the commands print on a small run: each is run for real, and what differs from run to run is masked."""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import typer
from typer.testing import CliRunner

import deltawire as dw
from deltawire.cli import app

WIDTH = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
RECORDED = Path(__file__).with_name("transcripts")
"""what commands printed beside a real vLLM server; tests/vllm/test_doc_blocks_of_servers.py compares"""
EXAMPLES = {
    "serve": ("deltawire serve --root buckets --port 8100",),
    "log": ("deltawire log ./bucket -n 4",),
    "verify": ("deltawire verify ./bucket",),
    "inspect": ("deltawire inspect ./bucket/runs/*/deltas/step_000002-*.safetensors",),
    "materialize": ("deltawire materialize ./bucket out --version 3",),
    "compact": ("deltawire compact ./bucket --mirror mirror --anchor-every 4",),
    "prune": ("deltawire prune ./bucket --keep-anchors 1 --keep-hours 0",),
    "keygen": ("deltawire keygen trainer.key",),
    "spaces render": ("deltawire spaces render --user me --out spaces",),
}
ORDER = ("serve", "log", "verify", "inspect", "materialize", "compact", "prune", "keygen", "spaces render")
"""`compact` writes what `prune` then leaves; the others only read"""
MASKS = (
    (r"\b[0-9a-f]{64}\b", "5fa3c1d2" * 8),
    (r"\b\d+\.\d s\b", "0.1 s"),
    (r"objects, [\d.]+ KiB", "objects, 225.0 KiB"),  # a commit names its host
    (r"\d+\.\d\d s after publish", "0.25 s after publish"),
    (r"(pause|write) \d+\.\d ms", r"\1 40.0 ms"),
    (r"127\.0\.0\.1:(?!8100)\d+", "127.0.0.1:8000"),
    (r"file:///\S*?/bucket", "file:///srv/bucket"),
)
PLACEMENT = "deltawire inspect --engine ENGINE | head -n 9"
RUN = "4be1c07a93d2f856"
"""the id that every run has here"""


def masked(text: str) -> str:
    """A transcript without what differs from run to run: the run's id, keys, seconds, ports and folders."""
    text = re.sub(r"\b(?=[0-9a-f]*[a-f])(?=[0-9a-f]*\d)[0-9a-f]{16}\b", RUN, text)
    for pattern, instead in MASKS:
        text = re.sub(pattern, instead, text)
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines()) + "\n"


def publish_small_run(url: str, versions: int = 9) -> None:
    """A run of two tensors, 101,000 weights, of which each step changes about one in a hundred."""
    rng = np.random.default_rng(0)
    weights = {
        "embed.weight": rng.normal(0, 0.02, (1000, 100)).astype(np.float32),
        "norm.weight": np.ones(1000, np.float32),
    }
    with (
        patch("socket.gethostname", return_value="trainer"),  # a commit names its writer; its age is 0 s until 2096
        patch("os.getpid", return_value=4711),
        dw.Publisher(dw.open_bucket(url, create=True), clock=lambda: 4e9) as publisher,
    ):
        for step in range(versions):
            publisher.publish(weights, step=step)
            publisher.flush(60)
            moved = rng.random(weights["embed.weight"].shape) < 0.01
            weights["embed.weight"][moved] *= np.float32(1.01)


def beside_a_server(engine: str, folder: Path, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, str]:
    """What the commands that speak to a vLLM server print, when it goes from one version of its weights to the next."""
    follow = "deltawire follow --bucket ./bucket --engine ENGINE --once"
    with _inside(folder), dw.Publisher(dw.open_bucket("./bucket", create=True)) as publisher:
        for weights in (before, after):
            publisher.publish(weights)
            publisher.flush(60)
            followed = _in_a_shell(follow, engine)
        audited = _in_a_shell("deltawire audit --engine ENGINE", engine)
        return {"follow": followed, "audit": audited, "inspect": _in_a_shell(PLACEMENT, engine)}


def _in_a_shell(line: str, engine: str) -> str:
    bare = line.replace("deltawire", f"{sys.executable} -m deltawire.cli").replace("ENGINE", engine)
    done = subprocess.run(bare, shell=True, env={**os.environ, **WIDTH}, stdout=subprocess.PIPE, text=True, check=True)
    return f"$ {line.replace('ENGINE', 'http://127.0.0.1:8000')}\n{masked(done.stdout)}"


def recorded(name: str) -> str:
    """What a command printed beside a real server, or nothing where it was not recorded."""
    file = RECORDED / f"{name.replace(' ', '-')}.txt"
    return file.read_text() if file.is_file() else ""


def transcripts() -> dict[str, str]:
    """For each command its lines at a prompt and what they print, on one small run in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder, _inside(Path(folder)):
        publish_small_run("./bucket")
        shown = {name: "\n".join(_at_prompt(line) for line in EXAMPLES[name]) for name in ORDER}
    names = {file.stem.replace("-", " ") for file in RECORDED.glob("*.txt")}
    return shown | {name: "\n".join(filter(None, [shown.get(name), recorded(name)])) for name in names}


def _at_prompt(line: str) -> str:
    words = [word for pattern in shlex.split(line)[1:] for word in (glob(pattern) or [pattern])]
    output = _of_server(words) if words[0] == "serve" else _of_command(words)
    return f"$ {line}\n{masked(output)}"


def _of_command(words: list[str]) -> str:
    done = CliRunner().invoke(app, words, env=WIDTH, prog_name="deltawire")
    if done.exit_code:
        raise typer.Exit(done.exit_code) from done.exception
    return done.stdout


def _of_server(words: list[str]) -> str:
    """What `serve` prints until it is ready, on any free port."""
    free = [*words[: words.index("--port") + 1], "0"]
    with subprocess.Popen([sys.executable, "-m", "deltawire.cli", *free], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            said = server.stdout.readline() + server.stdout.readline()
        finally:
            server.terminate()
    return re.sub(r"(127\.0\.0\.1):\d+", rf"\1:{words[words.index('--port') + 1]}", said)


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
