"""The one loop of every follower: look at the bucket, bring the server to the version, report, write a heartbeat."""

import re
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Generic, Self, TypeVar

from deltawire.errors import (
    AnotherFollower,
    BucketError,
    ChainError,
    EngineError,
    EngineUnsupported,
    FormatError,
    NotFound,
    Quarantined,
    error_text,
)
from deltawire.follow.beats import Beats
from deltawire.follow.health import SILENT_AFTER, Health
from deltawire.follow.news import Current, Note, Waiting
from deltawire.follow.options import FollowOptions
from deltawire.follow.source import Source
from deltawire.runlog.keys import HEAD_KEY
from deltawire.runlog.records import Position
from deltawire.weights.interrupts import as_raised

LOOK_ANYWAY = 5.0
"""seconds after which the server is looked at even if the bucket did not change: it may have been restarted"""
SAY_AGAIN = 60.0
"""seconds after which what still stands in the way is said again"""
R = TypeVar("R")


class FollowLoop(ABC, Generic[R]):
    """Keeps one server at the newest version of one bucket, or at a pinned one; `_advance` says how, and `R` is what it
    reports.

    `server` is its address, for its default name. `state` is the file that remembers the newest signed version, so that
    a bucket cannot lead back, not even after a restart. `any_run` is for `Source`.
    """

    def __init__(
        self, bucket_url: str, options: FollowOptions, *, server: str, state: Path | None, any_run: bool = False
    ) -> None:
        self.options = options  # a doubt about what is remembered is news at once
        self.source = Source(bucket_url, options, state=state, on_doubt=self._doubt, any_run=any_run)
        self.bucket = self.source.bucket
        self._poll = options.poll if options.poll is not None else self.bucket.poll_seconds
        self.health = Health(patience=max(SILENT_AFTER, 2 * self._poll))
        self.replica = options.replica or replica_name(server)
        self.beats = Beats(self.bucket, self.replica, self.health, clock=options.clock)
        self.options = options.changed(on_update=self.beats.hear(options.on_update))
        self.stopping = threading.Event()
        """set once `run` is to return"""
        self._stepping = threading.RLock()
        self._said, self._said_at = "", 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop `run`, wait for the update in progress, and close connections; the server keeps what it serves."""
        self.stopping.set()
        with self._stepping:
            self._let_go_of_server()
            self.source.close()

    def stop(self) -> None:
        """Have `run` return after the update in progress, if its pause has begun; safe in a signal handler."""
        self.stopping.set()

    def run(self) -> None:
        """Follow until stopped or closed. What passes is reported, every minute while it lasts, and looked at again;
        the server keeps what it serves. That is a failing or unreachable store or server, a damaged file, a chain that
        changed while it was read, or another trainer's run.

        Raises what a person must mend: EngineUnsupported, Quarantined, AnotherFollower, ApplyError.
        """
        look = _Look()
        while not self.stopping.is_set():
            try:
                self._look(look)
                self.beats.pace.answered()
                self.stopping.wait(max(0.0, self._between_looks() - self.bucket.poll_seconds))
            except (EngineUnsupported, Quarantined, AnotherFollower):
                raise
            except (BucketError, FormatError, ChainError, EngineError) as error:
                self.report(error)
                self.stopping.wait(self._between_looks())

    def step(self) -> R | None:
        """Bring the server to the newest version, once. None when there was nothing to do, nothing is published
        (`health.waiting` says what is missing), or the follower is being closed.

        Raises BucketError, FormatError, ChainError, ApplyError, EngineError; the server then serves what it served.
        """
        return self._step(self.options.pin)

    def _between_looks(self) -> float:
        """Seconds; longer than the store's own where many replicas share what it allows, unless they were given."""
        return self._poll if self.options.poll is not None else self.beats.pace.poll(self._poll)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Meanwhile the server is asked every few seconds what it serves, whatever the bucket does. A store that hangs
        must not make a server look dead, nor hide that one is."""
        done = threading.Event()

        def listen() -> None:
            while not done.wait(LOOK_ANYWAY):
                self.listen()

        thread = threading.Thread(target=listen, name="deltawire-listen", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(LOOK_ANYWAY)

    def listen(self) -> None:
        """Ask the server what it serves, unless it answered a moment ago, or was never brought to a version."""
        health = self.health
        if not health.joined or health.server_silence < LOOK_ANYWAY:
            return
        asked = health.clock()
        with suppress(EngineError, RuntimeError):  # what a closed client raises
            health.server_says(self._ask_server(), asked=asked)

    def beat(self, *, need: int | None = None, error: str | None = None) -> None:
        """Write our heartbeat, if it is time to."""
        self.beats.write(self.health.labelled, need=need, error=error)

    def report(self, error: Exception) -> None:
        """Say what stands in the way, here and in the heartbeat."""
        self.source.refresh()
        self.beats.pace.failed(error)
        self.health.fails(error)
        if self._is_due(type(error).__name__):
            self.options.on_problem(error)
        if not isinstance(error, NotFound):  # an entry would make a bucket that is gone
            self.beat(error=error_text(error))

    def _look(self, look: "_Look") -> None:
        """Wait for the bucket to change, and bring the server to what it says then, or when it is time."""
        if not look.greeted:
            with self._stepping:
                self._greet()
            look.greeted = True
        found = self.bucket.watch(HEAD_KEY, tag=look.tag, timeout=min(self._poll, self.bucket.poll_seconds))
        tag = found.tag if found else look.tag
        if tag == look.tag and self.health.clock() < look.at + LOOK_ANYWAY:
            return
        self._tell(self.step())
        look.tag, look.at = tag, self.health.clock()
        if self.health.waiting is None:  # an entry would make a bucket of what may be a misspelt name
            self.beat()

    def _tell(self, report: R | None) -> None:
        """Say that we wait, or that the server is current where no update says so."""
        health = self.health
        if health.waiting is not None:
            if self._is_due("waiting"):
                self.options.on_news(Waiting(health.waiting, health.clock() - health.waiting_since))
        elif health.served is not None:
            if report is None and self._said != "current" and not self.stopping.is_set():
                self.options.on_news(Current(health.served.run, health.served.version))
            self._said = "current"

    def _is_due(self, what: str) -> bool:
        """Whether to say this: when it is new, and again every minute while it lasts."""
        now = self.health.clock()
        if what == self._said and now < self._said_at + SAY_AGAIN:
            return False
        self._said, self._said_at = what, now
        return True

    def _step(self, pin: int | None) -> R | None:
        with self._stepping, as_raised():
            if self.stopping.is_set():
                return None
            self._greet()
            try:
                target = self.source.target(pin)
            except NotFound as error:
                if self.health.newest is not None:  # it was there before
                    raise
                self.health.waits(str(error))
                return None
            self.health.bucket_says(target.version)
            report = self._advance(target)
            self.health.problem = None
            return report

    def _keep_what_is_needed(self) -> None:
        """Before reading: what a joiner is about to read must not be pruned."""
        if self.health.labelled is None:
            self.beat(need=0)

    def _doubt(self, text: str) -> None:
        self.options.on_news(Note(text))

    def _greet(self) -> None:
        """What `run` does for the server before it looks at the bucket, which may not answer."""

    @abstractmethod
    def _advance(self, target: Position) -> R | None:
        """Bring the server to the target, and `health` with it."""

    @abstractmethod
    def _ask_server(self) -> Position | None:
        """What the server serves of the run followed. Raises EngineError."""

    @abstractmethod
    def _let_go_of_server(self) -> None:
        """Close what leads to the server."""


class _Look:
    """What the loop saw last: the tag of the bucket's HEAD, and when; and whether the server was greeted."""

    def __init__(self) -> None:
        self.tag: str | None = None
        self.at = -LOOK_ANYWAY
        self.greeted = False


def replica_name(engine_url: str) -> str:
    """This host and the server's address, as a key may hold them."""
    return re.sub(r"[^A-Za-z0-9]+", "-", f"{socket.gethostname()} {engine_url}")[:100].strip("-")
