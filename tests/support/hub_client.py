"""How a test talks to the bucket server: plain requests, and the real client in a process of its own."""

import http.client
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PAGE_SIZE = 10


def client_environment(folder: Path) -> dict[str, str]:
    """What the Hub client is told: no cache but this folder's, since one cache must never see two servers' data."""
    return {
        "HF_HOME": str(folder / "hf-home"),
        "HF_XET_CACHE": str(folder / "xet-cache"),
        "HF_TOKEN": "hf_fake",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_XET_CLIENT_RETRY_BASE_DELAY": "200ms",
    }


@dataclass(frozen=True)
class Answer:
    """An HTTP response, read."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


Ask = Callable[..., Answer]
"""`ask`, bound to a server."""


def ask(url: str, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
    """One plain HTTP request, with the path sent exactly as given."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    finally:
        connection.close()


def run_client(folder: Path, url: str, script: str, *arguments: str, **settings: str) -> str:
    """Run a Python script with a fresh Hub client as `api` in a process of its own; its standard output."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= client_environment(folder) | settings | {"HF_ENDPOINT": url}
    preamble = "import sys\nfrom pathlib import Path\nfrom huggingface_hub import HfApi\napi = HfApi()\n"
    done = subprocess.run(
        [sys.executable, "-c", preamble + script, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
