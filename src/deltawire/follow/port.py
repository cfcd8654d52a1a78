"""A port that answers GET requests: with a small JSON, a page, or a stream of events."""

import socket
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol, Self

import msgspec

PATIENCE = 60.0
"""seconds that a client may take to ask, or to read a piece; then its thread lets it go"""


@dataclass(frozen=True, slots=True)
class Answer:
    """What is said to a GET: status, media type, and a body, or pieces of one that come as things happen."""

    status: int
    kind: str
    body: bytes | Generator[bytes]
    headers: Mapping[str, str] = field(default_factory=dict)


class Route(Protocol):
    """What answers GETs of some paths."""

    def answer(self, path: str, query: str) -> Answer | None:
        """The answer to a path and its query; None for a path of somebody else's. It waits for nobody."""


def as_json(status: int, record: Any) -> Answer:
    """A record as a JSON answer."""
    return Answer(status, "application/json", msgspec.json.encode(record))


class _Handler(BaseHTTPRequestHandler):
    """One connection of a port."""

    routes: Sequence[Route] = ()

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        found = (route.answer(path, query) for route in self.routes)
        missing = as_json(404, {"error": f"{path} is not here"})
        answer = next((answer for answer in found if answer is not None), missing)
        with closing(_pieces(answer.body)) as pieces, suppress(ConnectionError, TimeoutError):
            self._send(answer, pieces)  # unless the client went away, or reads nothing

    do_HEAD = do_GET  # noqa: N815

    def _send(self, answer: Answer, pieces: Generator[bytes]) -> None:
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.kind)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if isinstance(answer.body, bytes):
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            for piece in pieces:
                self.wfile.write(piece)

    def log_message(self, *arguments: object) -> None:
        """Say nothing: the client has its answer."""


def _pieces(body: bytes | Generator[bytes]) -> Generator[bytes]:
    return (piece for piece in [body]) if isinstance(body, bytes) else body


class Port:
    """Answers GET and HEAD on a port with the first of `routes` that knows the path, each on a thread of its own.
    Raises OSError when the port cannot be had."""

    def __init__(
        self, routes: Sequence[Route], port: int, *, host: str = "127.0.0.1", patience: float = PATIENCE
    ) -> None:
        class Server(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
            block_on_close = False  # a stream may wait for news

        self._server = Server((host, port), type("Handler", (_Handler,), {"routes": routes, "timeout": patience}))
        at = f"[{host}]" if ":" in host else host
        self.url = f"http://{at}:{self._server.server_port}/"
        self._thread = threading.Thread(target=self._server.serve_forever, name="deltawire-port", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
