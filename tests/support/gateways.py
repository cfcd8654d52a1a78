"""A gateway before stand-ins for vLLM, each on a port of its own."""

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import uvicorn
from waiting import until

from deltawire.gateway.app import build_app
from deltawire.gateway.routing import Engine


class StubVLLM:
    """Answers completions at once, or streamed in pieces that a test lets go one by one."""

    def __init__(self, version: int | None = None) -> None:
        self.version, self.status, self.healthy = version, 200, True
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.pieces: list[bytes] = []
        self.go, self.gone = threading.Semaphore(0), threading.Event()
        self.answers: dict[str, str] = {}
        self.told: bytes | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(stub) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/health":
                    self.say(200 if stub.healthy else 500, {})
                elif self.path == "/weight_info":
                    label = "default" if stub.version is None else f"ab:{stub.version}"
                    self.say(200, {"weight_version": label})
                elif self.path == "/follower" and stub.told is not None:
                    self.say(200, stub.told)
                elif self.path == "/follower":
                    served = {"run": "ab", "version": stub.version} if stub.version is not None else None
                    self.say(
                        200, {"ready": stub.healthy, "reason": None if stub.healthy else "joining", "served": served}
                    )
                else:
                    self.say(200, {"data": [self.path]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.asked.append(body)
                stub.headers.append(dict(self.headers))
                if stub.status != 200:
                    self.say(stub.status, {"error": {"message": "Generation is paused."}})
                elif body.get("stream"):
                    self.stream()
                elif body.get("slow"):
                    if not self.rfile.read(1):  # the caller is gone before it is answered
                        stub.gone.set()
                else:
                    self.say(200, {"path": self.path, "served": stub.version})

            def stream(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                try:
                    for piece in stub.pieces:
                        stub.go.acquire(timeout=60)
                        self.wfile.write(piece)
                        self.wfile.flush()
                    while stub.go.acquire(timeout=60):
                        self.wfile.write(b": still here\n\n")
                except OSError:
                    stub.gone.set()

            def say(self, status: int, told: Any) -> None:
                data = told if isinstance(told, bytes) else json.dumps(told).encode()
                self.send_response(status)
                for name, value in stub.answers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments: object) -> None: ...

        return Handler


@contextmanager
def gateway(engines: Sequence[Engine], *, patience: float = 5.0) -> Iterator[str]:
    """The address of a gateway before these engines."""
    app = build_app(engines, patience=patience, poll=0.02)
    options = uvicorn.Config(app, port=0, log_level="critical", lifespan="on", timeout_graceful_shutdown=1)
    server = uvicorn.Server(options)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True  # force_exit would cut off what the lifespan still does
        thread.join(60)
