"""What following a bucket is, whatever a server does with a version: look, bring it to the newest, report, beat."""

import re
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Generic, Self, TypeVar

import msgspec

from deltawire import ledger, log
from deltawire.buckets import open_bucket
from deltawire.errors import (
    AccessRefused,
    BucketError,
    ChainError,
    EngineError,
    EngineUnsupported,
    FormatError,
    NotFound,
    OtherRun,
    Quarantined,
)
from deltawire.ledger import Heartbeat
from deltawire.manifests import HEAD_KEY, Position
from deltawire.signing import trust
from deltawire.subscriber import Subscriber
from deltawire.vllm.health import Standing
from deltawire.vllm.protocol import Engine

BEAT_EVERY = 30.0
"""seconds after which a replica's ledger entry is written again"""
LOOK_ANYWAY = 5.0
"""seconds after which the server is looked at even if the bucket did not change: it may have been restarted"""
E = TypeVar("E", bound=Engine)
R = TypeVar("R")


class Following(ABC, Generic[E, R]):
    """Keeps one server at the newest version of one bucket, or at a pinned one; `_advance` says how.

    `E` is how the server is reached, `R` what an update is reported as. `poll` is seconds between looks at the bucket,
    by default what suits the store; `trusted` are public keys, or files of them; `replica` names the entry under
    `replicas/`.
    """

    def __init__(
        self,
        bucket_url: str,
        engine: E,
        *,
        poll: float | None,
        pin: int | None,
        trusted: Iterable[str | Path],
        replica: str | None,
        on_update: Callable[[R], None],
        on_problem: Callable[[Exception], None],
        clock: Callable[[], float],
    ) -> None:
        self.bucket = open_bucket(bucket_url)
        self.standing = Standing()
        self._poll = poll if poll is not None else self.bucket.poll_seconds
        self._url, self._pin, self._trust, self._clock = bucket_url, pin, trust(trusted), clock
        self._on_update, self._on_problem = on_update, on_problem
        self._subscriber = Subscriber(self.bucket, trusted=self._trust)
        self._engine = engine
        self._stopping = threading.Event()
        self._stepping = threading.RLock()
        self._labelled: Position | None = None
        self._replica = replica or _replica_name(engine.url)
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

    def run(self) -> None:
        """Follow until closed. What passes (a store or server that fails or is out of reach, a damaged file, a chain
        that was read while it changed, another trainer's run) is reported, once while it lasts, and looked at again;
        the server keeps what it serves.

        Raises what a person must mend: EngineUnsupported, Quarantined, ApplyError."""
        seen: str | None = None
        looked, reported = -LOOK_ANYWAY, ""
        while not self._stopping.is_set():
            try:
                found = self.bucket.watch(HEAD_KEY, tag=seen, timeout=self._poll)
                tag = found.tag if found else seen
                if tag != seen or time.monotonic() >= looked + LOOK_ANYWAY:
                    self.step()
                    seen, looked, reported = tag, time.monotonic(), ""
                    self._beat()
            except (EngineUnsupported, Quarantined):
                raise
            except (BucketError, FormatError, ChainError, EngineError) as error:
                self._subscriber.refresh()
                if reported != str(error):
                    self._on_problem(error)
                reported = self.standing.problem = str(error)
                self._beat(error=f"{type(error).__name__}: {error}")
                self._stopping.wait(self._poll)

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
            ledger.beat(self.bucket, msgspec.structs.replace(entry, at=self._clock()))
        except AccessRefused:
            self._may_write = False
        except BucketError:  # the next one will tell
            return
        self._beaten, self._last_beat = time.monotonic(), str(entry)

    def step(self) -> R | None:
        """Bring the server to the newest version, once. None when there was nothing to do, nothing is published, or the
        follower is being closed.

        Raises BucketError, FormatError, ChainError, ApplyError, EngineError; the server then serves what it served.
        """
        with self._stepping:
            return None if self._stopping.is_set() else self._advance()

    def _keep_what_is_needed(self) -> None:
        """Before reading: what a joiner is about to read must not be pruned."""
        if self._labelled is None:
            self._beat(need=0)

    @abstractmethod
    def _advance(self) -> R | None:
        """Bring the server to `_target()`, and `standing` with it."""

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
            self._subscriber = Subscriber(self.bucket, trusted=self._trust)
            newest = self._subscriber.latest()
        if self._pin is None:
            return newest
        chain = self._subscriber.chain
        try:
            return chain.commit(self._pin).record.position
        except NotFound:
            raise chain.gap_at(self._pin, chain.versions()) from None


def _replica_name(engine_url: str) -> str:
    """This host and the server's address, as a key may hold them."""
    return re.sub(r"[^A-Za-z0-9]+", "-", f"{socket.gethostname()} {engine_url}")[:100].strip("-")
