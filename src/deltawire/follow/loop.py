"""What following a bucket is, whatever a server does with a version: look, bring it to the newest, report, beat."""

import re
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Generic, Self, TypeVar

import msgspec

from deltawire.buckets import open_bucket
from deltawire.errors import (
    AccessRefused,
    AnotherFollower,
    BucketError,
    ChainError,
    EngineError,
    EngineUnsupported,
    FormatError,
    NotFound,
    OtherRun,
    Quarantined,
)
from deltawire.follow.engine import Engine
from deltawire.follow.health import SILENT_AFTER, Standing
from deltawire.follow.news import Current, News, Note, Waiting
from deltawire.read.seen import Seen
from deltawire.read.subscriber import Subscriber
from deltawire.runlog import heartbeats, log
from deltawire.runlog.heartbeats import Heartbeat
from deltawire.runlog.keys import HEAD_KEY
from deltawire.runlog.records import Position
from deltawire.runlog.signing import trust

BEAT_EVERY = 30.0
"""seconds after which a replica's ledger entry is written again"""
LOOK_ANYWAY = 5.0
"""seconds after which the server is looked at even if the bucket did not change: it may have been restarted"""
SAY_AGAIN = 60.0
"""seconds after which what still stands in the way is said again"""
E = TypeVar("E", bound=Engine)
R = TypeVar("R")


class Following(ABC, Generic[E, R]):
    """Keeps one server at the newest version of one bucket, or at a pinned one; `_advance` says how.

    `E` is how the server is reached, `R` what an update is reported as. `poll` is seconds between looks at the bucket,
    by default what suits the store; `base` is a folder here with the run's base checkpoint; `trusted` are public keys,
    or files of them; `replica` names the entry under `replicas/`. `on_news` hears what is waited for and fetched, and
    when the server is current without an update.

    `state` is a file that remembers the newest signed version, so that a bucket cannot lead back, not even after a
    restart (RolledBack); `forget_state` begins it anew. `run` is the only run that is followed, beside those that
    continue it.
    """

    def __init__(
        self,
        bucket_url: str,
        engine: E,
        *,
        poll: float | None,
        pin: int | None,
        base: Path | str | None,
        trusted: Iterable[str | Path],
        state: Path | None,
        run: str | None,
        forget_state: bool,
        replica: str | None,
        on_update: Callable[[R], None],
        on_problem: Callable[[Exception], None],
        on_news: Callable[[News], None],
        clock: Callable[[], float],
    ) -> None:
        self.bucket = open_bucket(bucket_url)
        self._poll = poll if poll is not None else self.bucket.poll_seconds
        self.standing = Standing(patience=max(SILENT_AFTER, 2 * self._poll))
        self._url, self._pin, self._trust, self._clock = self.bucket.url, pin, trust(trusted), clock
        self._on_update, self._on_problem, self._on_news = on_update, on_problem, on_news
        self._said, self._said_at = "", 0.0
        self._base = None if base is None else Path(base).absolute()
        self._subscriber = Subscriber(self.bucket, base=self._base, trusted=self._trust)
        self._seen = Seen(state if self._trust else None, run=run, forget=forget_state, on_doubt=self._doubt)
        self._engine = engine
        self._stopping = threading.Event()
        self._stepping = threading.RLock()
        self._labelled: Position | None = None
        self._replica = replica or replica_name(engine.url)
        self._may_write, self._beaten, self._last_beat = True, -BEAT_EVERY, ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop `run`, wait for the update in progress, and close connections; the server keeps what it serves."""
        self._stopping.set()
        with self._stepping:
            self._engine.close()
            self._subscriber.close()

    def stop(self) -> None:
        """Have `run` return after the update in progress, if its pause has begun; safe in a signal handler."""
        self._stopping.set()

    def run(self) -> None:
        """Follow until stopped or closed. What passes (a store or server that fails or is out of reach, a damaged file,
        a chain that was read while it changed, another trainer's run) is reported, every minute while it lasts, and
        looked at again; the server keeps what it serves.

        Raises what a person must mend: EngineUnsupported, Quarantined, AnotherFollower, ApplyError."""
        seen: str | None = None
        looked, greeted = -LOOK_ANYWAY, False
        while not self._stopping.is_set():
            try:
                if not greeted:
                    with self._stepping:
                        self._greet()
                    greeted = True
                found = self.bucket.watch(HEAD_KEY, tag=seen, timeout=min(self._poll, self.bucket.poll_seconds))
                tag = found.tag if found else seen
                if tag != seen or self.standing.clock() >= looked + LOOK_ANYWAY:
                    self._tell(self.step())
                    seen, looked = tag, self.standing.clock()
                    if self.standing.waiting is None:  # an entry would make a bucket of what may be a misspelt name
                        self._beat()
                self._stopping.wait(max(0.0, self._poll - self.bucket.poll_seconds))
            except (EngineUnsupported, Quarantined, AnotherFollower):
                raise
            except (BucketError, FormatError, ChainError, EngineError) as error:
                self._subscriber.refresh()
                self.standing.fails(error)
                if self._is_due(type(error).__name__):
                    self._on_problem(error)
                if not isinstance(error, NotFound):  # nor make one anew that is gone
                    self._beat(error=f"{type(error).__name__}: {error}")
                self._stopping.wait(self._poll)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Meanwhile the server is asked every few seconds what it serves, whatever the bucket does: a store that hangs
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
        standing = self.standing
        if not standing.joined or standing.server_silence < LOOK_ANYWAY:
            return
        asked = standing.clock()
        with suppress(EngineError, RuntimeError):  # what a closed client raises
            standing.server_says(self._ask_server(), asked=asked)

    def _tell(self, report: R | None) -> None:
        """Say that we wait, or that the server is current where no update says so."""
        standing = self.standing
        if standing.waiting is not None:
            if self._is_due("waiting"):
                self._on_news(Waiting(standing.waiting, standing.clock() - standing.waiting_since))
        elif standing.served is not None:
            if report is None and self._said != "current" and not self._stopping.is_set():
                self._on_news(Current(standing.served.run, standing.served.version))
            self._said = "current"

    def _is_due(self, what: str) -> bool:
        """Whether to say this: when it is new, and again every minute while it lasts."""
        now = self.standing.clock()
        if what == self._said and now < self._said_at + SAY_AGAIN:
            return False
        self._said, self._said_at = what, now
        return True

    def _beat(self, *, need: int | None = None, error: str | None = None) -> None:
        """Write our ledger entry when it says something new or is getting old; a host that may only read has none."""
        standing, served = self.standing, self._labelled
        entry = Heartbeat(
            self._replica,
            run=served.run if served else None,
            version=served.version if served else None,
            root=served.root if served else None,
            need=need,
            staged=standing.staged,
            lag=standing.lag,
            audit=standing.audit,
            error=error,
        )
        if not self._may_write or (self._last_beat == str(entry) and time.monotonic() < self._beaten + BEAT_EVERY):
            return
        try:
            heartbeats.beat(self.bucket, msgspec.structs.replace(entry, at=self._clock()))
        except AccessRefused:
            self._may_write = False
        except BucketError:  # the next one will tell
            return
        self._beaten, self._last_beat = time.monotonic(), str(entry)

    def step(self) -> R | None:
        """Bring the server to the newest version, once. None when there was nothing to do, nothing is published
        (`standing.waiting` says what is missing), or the follower is being closed.

        Raises BucketError, FormatError, ChainError, ApplyError, EngineError; the server then serves what it served.
        """
        with self._stepping:
            if self._stopping.is_set():
                return None
            self._greet()
            try:
                target = self._target()
            except NotFound as error:
                if self.standing.newest is not None:  # it was there before
                    raise
                self.standing.waits(str(error))
                return None
            self.standing.bucket_says(target.version)
            report = self._advance(target)
            self.standing.problem = None
            return report

    def _keep_what_is_needed(self) -> None:
        """Before reading: what a joiner is about to read must not be pruned."""
        if self._labelled is None:
            self._beat(need=0)

    def _doubt(self, text: str) -> None:
        self._on_news(Note(text))

    def _greet(self) -> None:
        """What `run` does for the server before it looks at the bucket, which may not answer."""

    @abstractmethod
    def _advance(self, target: Position) -> R | None:
        """Bring the server to the target, and `standing` with it."""

    @abstractmethod
    def _ask_server(self) -> Position | None:
        """What the server serves of the run followed. Raises EngineError."""

    def _target(self) -> Position:
        """The version to serve: the pinned one, else the newest; of the run that continues ours when HEAD names it."""
        try:
            newest = self._subscriber.latest()
        except OtherRun:
            if not log.continues(
                self.bucket, log.read_head(self.bucket).run, self._subscriber.run.run, trust=self._trust
            ):
                raise
            self._subscriber.close()
            self._subscriber = Subscriber(self.bucket, base=self._base, trusted=self._trust)
            newest = self._subscriber.latest()
        self._seen.admit(self._subscriber, newest, pinned=self._pin is not None)
        if self._pin is None:
            return newest
        chain = self._subscriber.chain
        try:
            return chain.commit(self._pin).record.position
        except NotFound:
            raise chain.gap_at(self._pin, chain.versions()) from None


def replica_name(engine_url: str) -> str:
    """This host and the server's address, as a key may hold them."""
    return re.sub(r"[^A-Za-z0-9]+", "-", f"{socket.gethostname()} {engine_url}")[:100].strip("-")
