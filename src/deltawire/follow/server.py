"""One engine under a follower's lease: taken over as it was left, waited for, swapped to a version, named."""

import threading
from contextlib import suppress

import msgspec

from deltawire.errors import (
    BadSignature,
    BucketError,
    EngineError,
    EngineUnsupported,
    Unavailable,
    recorded_error,
)
from deltawire.follow.engine import Engine
from deltawire.follow.health import Health
from deltawire.follow.lease import ServerLease
from deltawire.follow.news import Fetching
from deltawire.follow.options import FollowOptions
from deltawire.follow.status import ServerStatus
from deltawire.follow.workers import nap
from deltawire.runlog.records import Position

SLOW = 10.0
"""seconds after which a worker's work is reported while it goes on"""
UNVERIFIED = "unverified"
"""what a server reports whose weights were found to be no version"""


class DrivenServer:
    """An engine whose updates this follower of the bucket at `url` drives, by a `lease` that it renews.

    `health.labelled` is the version that the engine reports by our doing. `stopping` ends every wait. `signed` says
    whether this follower gives keys to trust.
    """

    def __init__(
        self,
        engine: Engine,
        url: str,
        lease: ServerLease,
        health: Health,
        options: FollowOptions,
        *,
        stopping: threading.Event,
        signed: bool,
    ) -> None:
        self.engine, self.lease = engine, lease
        self._url, self._health, self._options = url, health, options
        self._stopping, self._signed = stopping, signed

    def take(self) -> ServerStatus | None:
        """The server's status once this follower drives it, and it generates; None when we were closed meanwhile."""
        if (status := self.lease.status()) is None:
            return None
        if status.torn:  # a follower was killed between some workers' writes and the others'
            self.engine.revert()
            status = self.engine.status()
        if status.quarantined:
            self.disown()
        if status.session_open:
            self.engine.finish(None)
        if self.engine.is_paused():
            self.engine.resume()
        return status

    def idle(self, target: Position | None = None) -> ServerStatus | None:
        """The server's status once its workers have done what they were asked, however slow the store is. None when
        this follower was closed meanwhile. The server generates all the while."""
        reported, fetched = False, None
        while not self._stopping.is_set():
            status = self.lease.confirmed()
            if status.session_open:  # by one that lost the lease to us, and came back late
                self.engine.finish(None)
                self.engine.resume()
            self._health.server_says(status.position)
            if status.fetching is not None and status.fetching != fetched and target is not None:
                fetched = status.fetching
                self._options.on_news(Fetching(target.run, target.version, *fetched))
            if not status.staging:
                return status
            if status.doing_s > SLOW and not reported:
                self._report_slow(status)
                reported = True
            self._stopping.wait(nap(status.doing_s))
        return None

    def _report_slow(self, status: ServerStatus) -> None:
        why = self.engine.why_unreached(self._url)
        worker = f"{self.engine.software}'s worker"
        slow = Unavailable(f"{worker}: {status.doing} since {status.doing_s:.0f} s, and goes on{why}")
        self._health.fails(slow)
        self._options.on_problem(slow)

    def write(self, target: Position) -> ServerStatus:
        """Open a session, pause, and have the workers write what they staged. The server stays paused, also when this
        fails, until `conclude`, `withdraw` or `let_go`."""
        self.lease.confirmed()
        self.engine.start()
        self.engine.pause(self._options.pause, clear_cache=self._options.clear_cache)
        self.engine.update(self._url, target)
        status = self.lease.confirmed()
        if status.torn:
            self.engine.revert()
        return status

    def conclude(self, target: Position, status: ServerStatus) -> None:
        """After a write: close the session, name the version that is served, resume. Generation is resumed whatever
        happens."""
        try:
            self.engine.finish(str(target) if status.position == target else None)
        except BaseException:
            self.let_go()
            raise
        self.engine.resume()
        self._health.labelled = status.position

    def withdraw(self) -> None:
        """After a write: put back what it replaced, unless that was concluded; close the session, resume."""
        try:
            self.engine.revert()
        finally:
            self.let_go()

    def let_go(self) -> None:
        """End the session and the pause of an update that failed, as far as the server lets us; the next step looks
        again. A follower that has taken the lease keeps its own."""
        with suppress(EngineError):
            status = self.engine.status()
            if status.session_open and not status.lease.mine:
                return
            if status.session_open:
                self.engine.finish(None)
        with suppress(EngineError):
            self.engine.resume()

    def require(self, status: ServerStatus) -> None:
        """Raise what a worker recorded. What the bucket refused it may be open to us: it reads by itself."""
        if status.error is None:
            return
        error = recorded_error(msgspec.to_builtins(status.error))
        if isinstance(error, BucketError):
            said = f"said by the server at {self.engine.url}, which reads the bucket itself, by its own environment"
            raise type(error)(f"{error} ({said}{self.engine.why_unreached(self._url)})")
        if status.error.kind in ("ImportError", "ModuleNotFoundError"):
            raise EngineUnsupported(f"the server at {self.engine.url}: {status.error.message}")
        if isinstance(error, BadSignature) and not self._signed:
            raise BadSignature(f"{error}; this server {self.keeps_keys}")
        raise error

    def disown(self) -> None:
        """Have a server whose weights are in doubt stop naming a version, until an anchor has made them sure again."""
        self._health.labelled = None
        if self.engine.weight_version() != UNVERIFIED:
            self.engine.label(UNVERIFIED)

    def label(self, position: Position) -> None:
        """Name the version of a server that holds it but does not say so. It is fresh from that checkpoint, or was left
        by a killed follower."""
        if self.engine.weight_version() != str(position):
            self.engine.label(str(position))
        self._health.labelled = position

    @property
    def keeps_keys(self) -> str:
        """What an operator should know of a server that trusts an earlier follower's keys."""
        return (
            "accepts only what the public keys signed that an earlier follower gave it with --trust, though this one "
            f"gives none: give others with --trust, or restart {self.engine.software}"
        )
