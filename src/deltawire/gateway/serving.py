"""A gateway as a process: it listens until a signal ends it, and finishes what is in flight."""

import socket
from collections.abc import Callable, Sequence
from contextlib import closing, suppress

import uvicorn

from deltawire.errors import Unavailable
from deltawire.gateway.app import build_app
from deltawire.gateway.routing import Engine

GRACE = 30
"""seconds that answers in flight have to end"""


def serve(
    engines: Sequence[Engine],
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    patience: float = 30.0,
    poll: float = 0.5,
    on_ready: Callable[[str], object] = lambda url: None,
) -> None:
    """Serve until SIGINT or SIGTERM. `on_ready` is called with the address once it accepts requests. Raises
    Unavailable if the port cannot be had."""
    with closing(_listen(host, port)) as listener:
        at = f"[{host}]" if ":" in host else host
        app = build_app(engines, patience=patience, poll=poll)
        options = uvicorn.Config(app, log_level="warning", lifespan="on", timeout_graceful_shutdown=GRACE)
        server = _Server(options, lambda: on_ready(f"http://{at}:{listener.getsockname()[1]}"))
        with suppress(KeyboardInterrupt):
            server.run([listener])


class _Server(uvicorn.Server):
    """Says when it is ready."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], object]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise Unavailable(f"cannot listen at {host} port {port}: {error.strerror}; name another --port") from None
    return listener
