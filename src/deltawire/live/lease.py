"""Which follower drives a server: one at a time, by a lease that its status calls renew and its changes carry.

Worker 0's clock says how long a lease was not renewed. Who may take it is decided by the newcomer, from worker 0's
answer; each worker then swaps holders only if nothing happened since that answer. All workers get the same calls in
the same order, so all decide alike. What expires is the right to be left alone, not to write. A follower that comes
back late goes on, unless another has taken the lease; then every worker refuses it.
"""

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from deltawire.errors import AnotherFollower, EngineUnavailable

TTL = 15.0
"""seconds without a renewal after which a lease may be taken by anybody"""
RENEW = 5.0
"""seconds within which a follower that runs renews its lease"""


class Holder(msgspec.Struct, frozen=True):
    """A follower, as others see it. `started` tells a process from a later one of the same number."""

    replica: str
    pid: int
    started: str
    host: str
    bucket: str

    def is_gone(self) -> bool:
        """Whether this is a process of this host that runs no more."""
        return self.host == socket.gethostname() and _started(self.pid) != self.started

    def may_be_replaced_by(self, other: "Holder") -> bool:
        """Whether another follower need not wait: ours is gone, or is in its own process. Or it was the same replica in
        another place, as a container that was started again."""
        if self.host == other.host:
            return self.is_gone() or (self.pid, self.started) == (other.pid, other.started)
        return self.replica == other.replica


def this_follower(replica: str, bucket: str) -> Holder:
    """A follower in this process."""
    return Holder(replica, os.getpid(), _started(os.getpid()), socket.gethostname(), bucket)


class View(msgspec.Struct, frozen=True):
    """What worker 0 says of the lease. `turn` counts what happened to it; `idle` are seconds since it was renewed,
    `age` since it was taken; `mine` whether the asker holds it."""

    turn: int = 0
    holder: Holder | None = None
    idle: float = 0.0
    age: float = 0.0
    mine: bool = False

    def is_free_for(self, newcomer: Holder) -> bool:
        """Whether a newcomer may take it without `take_over`."""
        return self.holder is None or self.idle > TTL or self.holder.may_be_replaced_by(newcomer)

    @property
    def refusal(self) -> AnotherFollower:
        """The error for every other follower."""
        return AnotherFollower(
            f"{_named(self.holder)} drives this server since {self.age:.0f} s, renewed {self.idle:.0f} s ago: stop it, "
            "or take over with --take-over"
        )


class Lease:
    """One worker's side of it. A call that carries the holder's `token` is the holder's."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._turn, self._token = 0, ""
        self._holder: Holder | None = None
        self._taken = self._renewed = clock()

    def view(self, token: str | None) -> View:
        """Where it stands; the holder's asking renews it."""
        mine = self._is_holders(token)
        if mine:
            self._turn, self._renewed = self._turn + 1, self._clock()
        now = self._clock()
        return View(self._turn, self._holder, now - self._renewed, now - self._taken, mine)

    def take(self, turn: int | None, token: str, holder: Holder) -> bool:
        """Give it to a follower, unless something happened to it since `turn` (None: whatever happened)."""
        if turn is not None and turn != self._turn:
            return False
        self._turn, self._token, self._holder = self._turn + 1, token, holder
        self._taken = self._renewed = self._clock()
        return True

    def release(self, token: str | None) -> None:
        """The holder needs it no more."""
        if self._is_holders(token):
            self._turn, self._token, self._holder = self._turn + 1, "", None

    def require(self, token: str | None, *, alone: bool) -> None:
        """Raise AnotherFollower unless a call that changes something is the holder's, or nobody holds the lease and
        the call carries none. Where one worker is `alone`, a call by hand is accepted when the lease has ended."""
        if self._is_holders(token):
            return
        ended = self._holder is None or (alone and self._clock() - self._renewed > TTL)
        if token or not ended:
            raise self.view(None).refusal if self._holder else EngineUnavailable("the lease has ended: take it again")

    def _is_holders(self, token: str | None) -> bool:
        return self._holder is not None and token == self._token


def _named(holder: Holder | None) -> str:
    if holder is None:
        return "another follower"
    return f"follower {holder.replica} (pid {holder.pid} on {holder.host}, of {holder.bucket})"


def _started(pid: int) -> str:
    """When a process of this host started, in a unit of its system's; empty when it runs no more."""
    if not Path("/proc/self/stat").exists():
        return "some time"
    with suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    return ""
