"""Whether a replica may be sent requests: it serves a version, and one that is new enough."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec

from deltawire.manifests import Position

BLIND_AFTER = 60.0
"""seconds without a look at bucket and engine after which nobody knows how old a policy is"""


@dataclass
class Standing:
    """What a follower knows of its engine and its bucket."""

    served: Position | None = None
    newest: int | None = None
    staged: int | None = None
    audit: str | None = None
    problem: str | None = None
    looked: float | None = None
    joined: bool = False
    """whether what should be served was served, once since the follower began"""

    @property
    def lag(self) -> int | None:
        """Versions between the one served and the one it should be."""
        return None if self.served is None or self.newest is None else abs(self.newest - self.served.version)

    def why_unready(self, max_staleness: int | None) -> str | None:
        """Why no request should be sent to the engine, or None. `max_staleness` counts versions."""
        if self.served is None or self.lag is None:
            return self.problem or "no version is served yet"
        if not self.joined:
            return self.problem or f"joining: version {self.served.version} is served, {self.lag} behind"
        if max_staleness is None:
            return None
        if self.lag > max_staleness:
            return f"version {self.served.version} is served, {self.lag} behind; at most {max_staleness} may be"
        if self.looked is not None and time.monotonic() > self.looked + BLIND_AFTER:
            return self.problem or "neither bucket nor engine was reached for a minute"
        return None


class HealthServer:
    """Answers GET on a port of this host: 200 while `why_unready` returns None, else 503 and the reason."""

    def __init__(self, port: int, why_unready: Callable[[], str | None], standing: Standing) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                reason = why_unready()
                told = {"ready": reason is None, "reason": reason, "served": standing.served, "lag": standing.lag}
                body = msgspec.json.encode(told)
                self.send_response(200 if reason is None else 503)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                """Say nothing: whoever asks is told."""

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/health"
        self._thread = threading.Thread(target=self._server.serve_forever, name="deltawire-health", daemon=True)
        self._thread.start()

    def __enter__(self) -> "HealthServer":
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
