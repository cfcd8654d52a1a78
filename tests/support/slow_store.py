"""A way to a store on which answers hang or trickle: a TCP proxy on this host."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PIECE, EVERY = 4096, 0.02
"""bytes at a time and seconds between them, of an answer that trickles"""


class SlowWay:
    """Passes connections on to `port`. `mode` is "pass", "hang" (nothing comes back until it is changed, and then the
    connection ends) or "trickle"."""

    def __init__(self, port: int) -> None:
        self._port, self._changed = port, threading.Condition()
        self._mode, self.hanging = "pass", 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def mode(self) -> str:
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        with self._changed:
            self._mode = mode
            self._changed.notify_all()

    def close(self) -> None:
        self.mode = "closed"
        self._server.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._server.accept()
                store = socket.create_connection(("127.0.0.1", self._port))
                threading.Thread(target=self._pass, args=(client, store), daemon=True).start()
                threading.Thread(target=self._answer, args=(store, client), daemon=True).start()

    def _pass(self, client: socket.socket, store: socket.socket) -> None:
        with ended(client, store):
            while data := client.recv(1 << 16):
                store.sendall(data)

    def _answer(self, store: socket.socket, client: socket.socket) -> None:
        with ended(client, store):
            while data := store.recv(PIECE if self._mode == "trickle" else 1 << 16):
                with self._changed:
                    if self._mode == "hang":
                        self.hanging += 1
                        self._changed.wait_for(lambda: self._mode != "hang")
                        self.hanging -= 1
                        return
                    if self._mode == "trickle":
                        self._changed.wait(EVERY)
                client.sendall(data)


@contextmanager
def ended(*sockets: socket.socket) -> Iterator[None]:
    """Close these at the end, whoever ended."""
    try:
        with suppress(OSError):
            yield
    finally:
        for each in sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
