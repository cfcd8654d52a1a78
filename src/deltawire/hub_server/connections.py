"""How many connections there may be, and how long a client may leave each of them waiting.

uvicorn ends only a connection that is idle between two requests. Here every wait for a client has an end: for the rest
of a request's header, for a body, for an answer to be taken. When all places are taken, a new client gets the place of
the one that has kept us waiting longest, so clients that are slow on purpose shut nobody out.
"""

import asyncio
import resource
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_OTHER_FILES = 64
"""what the process has open besides: the database, files that are being read"""
_LEAST_BYTES = 64 * 1024
"""what a client has to send of a body within `stall_seconds`, or all of a shorter one"""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What clients may take up."""

    connections: int | None = None
    """open at a time; None: as many as the process may have files for"""
    header_bytes: int = 32 * 1024
    """of a request line with its headers"""
    header_seconds: float = 20.0
    """from the first byte of a request, or from the connection, to the end of its header"""
    stall_seconds: float = 120.0
    """for 64 KiB of a body to arrive, or a piece of an answer (1 MiB at most) to be taken"""

    def places(self) -> int:
        """How many connections there may be. Each has a file of its own open while it sends or fetches a xorb."""
        if self.connections is not None:
            return self.connections
        return max(8, min(1024, (_files() - _OTHER_FILES - self.backlog()) // 2))

    def backlog(self) -> int:
        """How many clients may be let in at a time, before they are counted. More of them wait for a second."""
        return max(8, min(512, _files() // 4))


def _files() -> int:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 20 if files == resource.RLIM_INFINITY else files


DEFAULT_BOUNDS = Bounds()


class Phase(Enum):
    """What a connection waits for."""

    IDLE = auto()
    """the client's next request; uvicorn ends that wait"""
    HEADER = auto()
    """the rest of a request's header"""
    BODY = auto()
    """a request's body"""
    ANSWER = auto()
    """our answer"""
    TAKING = auto()
    """the client to take what was sent"""
    REST = auto()
    """a body whose request is answered already, or the end of the connection"""


class Connection(H11Protocol):
    """A connection that knows what it waits for and since when. `overdue` is asked every moment.

    h11, not httptools: that one has no bound on the length of a header.
    """

    def __init__(self, *, bounds: Bounds, places: int, **given: Any) -> None:
        super().__init__(**given)
        self._bounds, self._places = bounds, places
        self._arrived = self._taken = 0
        self._state: tuple[object, ...] = ()
        self._since = self.loop.time()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a place, if there is one: a free one, or that of the client that has us waiting longest."""
        super().connection_made(transport)
        others = [one for one in self.connections if isinstance(one, Connection) and one is not self and one.is_open()]
        if len(others) < self._places:
            return
        now = self.loop.time()
        waiting = [one for one in others if one.gives_way(now)]
        if waiting:
            min(waiting, key=lambda one: one._since).transport.abort()
        else:
            self.limit_concurrency = 0  # uvicorn answers 503 once it has the header

    def data_received(self, data: bytes) -> None:
        """Count what arrives."""
        self._arrived += len(data)
        super().data_received(data)

    def resume_writing(self) -> None:
        """Count what the client takes."""
        self._taken += 1
        super().resume_writing()

    def is_open(self) -> bool:
        """Whether it is not about to end."""
        return not self.transport.is_closing()

    def gives_way(self, now: float) -> bool:
        """Whether its place may go to another: no request is under way, or the client is slow to do its part of it."""
        phase = self._phase()
        if phase in (Phase.IDLE, Phase.HEADER):
            return True
        return phase is not Phase.ANSWER and now - self._since > self._bounds.header_seconds

    def overdue(self, now: float) -> bool:
        """Whether the client has had its time. Called every moment, with the seconds of the loop's clock."""
        phase = self._phase()
        progress = self._arrived // _LEAST_BYTES if phase is Phase.BODY else self._taken
        state = (phase, self.cycle, progress)
        if state != self._state or phase in (Phase.IDLE, Phase.ANSWER):
            self._state, self._since = state, now
        short = phase in (Phase.HEADER, Phase.REST)
        return now - self._since > (self._bounds.header_seconds if short else self._bounds.stall_seconds)

    def turn_away(self) -> None:
        """End the connection, saying why where the client can still hear it."""
        if self._phase() is Phase.HEADER and self.is_open():
            self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            self.transport.close()
        else:
            self.transport.abort()

    def _phase(self) -> Phase:
        if self.flow.write_paused:
            return Phase.TAKING
        if not self.is_open():
            return Phase.REST
        if self.timeout_keep_alive_task is not None:
            return Phase.IDLE
        if self.cycle is None or self.cycle.response_complete:
            return Phase.HEADER if self.conn.their_state is h11.IDLE else Phase.REST
        return Phase.BODY if self.cycle.more_body and not self.flow.read_paused else Phase.ANSWER
