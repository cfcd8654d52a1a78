"""How the bucket server is run: blocking, in a thread of this process, or as a process of its own."""

import asyncio
import errno
import ipaddress
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import uvicorn
from starlette.applications import Starlette

from deltawire.errors import AccessRefused, Unavailable
from deltawire.hub_server.app import Inject, create_app
from deltawire.hub_server.connections import DEFAULT_BOUNDS, Bounds, Connection
from deltawire.hub_server.events import Feed
from deltawire.hub_server.home import Home
from deltawire.hub_server.store import Store
from deltawire.hub_server.users import Users, read_users

_LOG_TAIL_BYTES = 2000


def serve(
    root: Path | str,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    page_size: int = 1000,
    users: Path | str | None = None,
    bounds: Bounds = DEFAULT_BOUNDS,
    home: Callable[[Store], Home] | None = None,
    on_ready: Callable[[str], object] = lambda url: None,
) -> None:
    """Serve the buckets under `root` until SIGINT or SIGTERM, to the users a file names, else to anyone here.

    `bounds` are what clients may take up. `home` makes the page at /, of a server without users alone, for anyone who
    reaches it sees all of it. `on_ready` is called with the server's URL ("http://127.0.0.1:41234") once it
    accepts requests; port 0 is any free one. Raises AccessRefused if `host` is not loopback and there are no users,
    FormatError for a file that names none, Unavailable if the port or the folder is taken.
    """
    known = None if users is None else read_users(users)
    with closing(_listen(host, port, known)) as listener, closing(Store(root)) as store:
        page = home(store) if home is not None and known is None else None
        app = create_app(store, page_size=page_size, users=known, home=page)
        server = _Server(app, bounds, on_ready=lambda: on_ready(_url(listener)))
        with suppress(KeyboardInterrupt):  # uvicorn raises it again once it has finished
            server.run([listener])


class HubServer:
    """The server in a background thread. The folder is taken at once; requests are answered from `start` on.

        with HubServer("buckets") as hub:
            HfApi(endpoint=hub.url, token="any").create_bucket("me/run")

    Code that runs against the Hub runs against this server when `HF_ENDPOINT` names its URL.

    `bounds` are what clients may take up. `faults` may answer in the server's place. Raises what `serve` raises.
    """

    def __init__(
        self,
        root: Path | str,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        page_size: int = 1000,
        users: Path | str | None = None,
        bounds: Bounds = DEFAULT_BOUNDS,
        faults: Inject = lambda request: None,
    ) -> None:
        known = None if users is None else read_users(users)
        self._listener = _listen(host, port, known)
        try:
            self._store = Store(root)
        except BaseException:
            self._listener.close()
            raise
        self.url = _url(self._listener)
        self._ready = threading.Event()
        app = create_app(self._store, page_size=page_size, users=known, faults=faults)
        self._server = _Server(app, bounds, on_ready=self._ready.set)
        self._thread = threading.Thread(target=self._run, name="hub-server", daemon=True)

    def start(self) -> Self:
        """Return once requests are answered. Raises Unavailable if that fails."""
        self._thread.start()
        self._ready.wait()
        if not self._server.started:
            self.close()
            raise Unavailable(f"the bucket server on {self.url} did not start")
        return self

    def _run(self) -> None:
        try:
            self._server.run([self._listener])
        finally:
            self._ready.set()

    def close(self) -> None:
        """Finish the requests in progress and give the folder and the port back."""
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join()
        self._listener.close()
        self._store.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class HubProcess:
    """The server as a process of its own, so that its work does not share this interpreter's lock.

    `log` gets its standard output and error; without it they are dropped.
    """

    def __init__(
        self,
        root: Path | str,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        page_size: int = 1000,
        users: Path | None = None,
        log: Path | None = None,
    ) -> None:
        self._arguments = [str(root), host, str(port), str(page_size), str(users or "")]
        self._root = str(root)
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    @property
    def pid(self) -> int:
        """Of the running process."""
        if self._process is None:
            raise Unavailable("the bucket server is not running; call start()")
        return self._process.pid

    def start(self, *, timeout: float = 60.0) -> Self:
        """Return once requests are answered and `url` is known.

        Raises Unavailable with the end of the log if the process ends first or takes longer than `timeout` seconds.
        """
        reader, writer = os.pipe()
        arguments = [*self._arguments, str(writer)]
        with open(self._log or os.devnull, "ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "deltawire.hub_server", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[writer],
            )
        os.close(writer)
        with open(reader, "rb") as ready:
            answered = select.select([ready], [], [], timeout)[0]
            self.url = ready.read().decode() if answered else ""
        if not self.url:
            self.kill()
            raise Unavailable(f"the bucket server for {self._root} did not start; {self._log_tail()}")
        return self

    def close(self, *, timeout: float = 20.0) -> None:
        """Ask it to finish (SIGTERM), wait, and insist after `timeout` seconds. Does nothing if it is not running."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process = None

    def kill(self) -> None:
        """End it at once (SIGKILL), as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _log_tail(self) -> str:
        if self._log is None:
            return "give it a log= to see why"
        return f"{self._log} ends: {self._log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors='replace')}"

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Server(uvicorn.Server):
    """uvicorn, telling when it is ready. It is given an open socket, so the port is known before it starts."""

    def __init__(self, app: Starlette, bounds: Bounds, *, on_ready: Callable[[], object]) -> None:
        config = uvicorn.Config(
            app,
            http=cast("type[asyncio.Protocol]", partial(Connection, bounds=bounds, places=bounds.places())),
            h11_max_incomplete_event_size=bounds.header_bytes,
            backlog=bounds.backlog(),
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_keep_alive=60,
            timeout_graceful_shutdown=10,
        )
        super().__init__(config)
        self._feed: Feed = app.state.feed
        self._home: Home | None = app.state.home
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start accepting requests, then say so."""
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: end the connections of clients that have had their time."""
        now = asyncio.get_running_loop().time()
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection) and connection.overdue(now):
                connection.turn_away()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish; streams of events first, which would never end by themselves."""
        self._feed.close()
        if self._home is not None:
            self._home.close()
        await super().shutdown(sockets)


def _listen(host: str, port: int, users: Users | None) -> socket.socket:
    address = "127.0.0.1" if host == "localhost" else host
    try:
        loopback = ipaddress.ip_address(address).is_loopback
    except ValueError:
        loopback = False
    if not loopback and users is None:
        raise AccessRefused(
            f"users and tokens are needed to listen beyond loopback, and this server has none: "
            f"give it a file of users, or use host 127.0.0.1 instead of {host}"
        )
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
        listener.listen()  # two sockets may be bound to a port, while neither listens
    except (OSError, OverflowError) as error:
        listener.close()
        why = error.strerror if isinstance(error, OSError) else "no such port"
        raise Unavailable(f"cannot listen on {host} port {port}: {why}; {_remedy(error)}") from error
    return listener


def _remedy(error: Exception) -> str:
    if isinstance(error, OSError) and (isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL):
        return "give it an address of this machine (--host)"
    return "give it another port (--port; 0 is any free one)"


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
