"""Follow a bucket and drive a vLLM server through each new version: stage while it generates, pause, commit, resume.

The engine, not this process's memory, says where the server stands; so a follower may die and start again at any time.
"""

import re
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

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
    Gap,
    NotFound,
    OtherRun,
    Quarantined,
    WrongBase,
)
from deltawire.ledger import Heartbeat
from deltawire.manifests import HEAD_KEY, Position
from deltawire.signing import trust
from deltawire.subscriber import Subscriber
from deltawire.vllm.client import EngineClient
from deltawire.vllm.health import Standing
from deltawire.vllm.protocol import AuditReport, Engine, PauseMode, WorkerStatus, named_error

ASK_AGAIN = 0.02
"""seconds between looks at a worker that is staging"""
BEAT_EVERY = 30.0
"""seconds after which a replica's ledger entry is written again"""
UNVERIFIED = "unverified"
"""what a server reports whose weights were found to be no version"""
LOOK_ANYWAY = 5.0
"""seconds after which the server is looked at even if the bucket did not change: it may have been restarted"""


class UpdateReport(msgspec.Struct, frozen=True):
    """One update that the server serves now.

    `from_version` is None when it started from an anchor. `pause_ms` is measured here, from opening the session to the
    answer to the resume; `write_ms` by the worker, around the writes alone. `verified` means that every changed
    tensor's new digest was equal to the commit's before anything was written. `publish_to_served_s` compares this
    host's clock with the publisher's.
    """

    run: str
    version: int
    from_version: int | None
    changed: int
    wire_bytes: int
    fetch_s: float
    stage_s: float
    pause_ms: float
    write_ms: float
    verified: bool
    publish_to_served_s: float


class Follower:
    """Keeps one vLLM server at the newest version of one bucket. It alone drives the server's updates: a pause or a
    session that it finds was left by a follower that was killed, and is ended.

    `pin` holds the server at a version, older or newer, instead of the newest: how a bad policy is withdrawn.
    `trusted` are public keys, or files of them: then only records they signed are followed.

    `replica` names the entry under `replicas/` that tells others, and retention, what it serves and needs.

    `pause` says what becomes of requests in flight during an update: "keep" (default) holds them where they are, "wait"
    lets them finish first, "abort" ends them. Every `audit_every` updates all of live memory is digested anew (0:
    never), as it is after every anchor; the server generates nothing meanwhile. Weights that turn out to be no version
    are made anew from the bucket.

    `poll` is seconds between looks at the bucket, by default what suits the store. `clear_cache` chooses what happens
    to KV computed with older weights: True (default) drops the prefix cache and recomputes running requests, so that no
    token is sampled from mixed versions; False keeps both and pauses shorter.
    """

    def __init__(
        self,
        bucket_url: str,
        engine: str | Engine,
        *,
        poll: float | None = None,
        pin: int | None = None,
        trusted: Iterable[str | Path] = (),
        pause: PauseMode = "keep",
        clear_cache: bool = True,
        audit_every: int = 100,
        replica: str | None = None,
        on_update: Callable[[UpdateReport], None] = lambda report: None,
        on_problem: Callable[[Exception], None] = lambda error: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.bucket = open_bucket(bucket_url)
        self._poll = poll if poll is not None else self.bucket.poll_seconds
        self._url, self._clear_cache, self._clock = bucket_url, clear_cache, clock
        self._on_update, self._on_problem = on_update, on_problem
        self._pin, self._trust = pin, trust(trusted)
        self._subscriber = Subscriber(self.bucket, trusted=self._trust)
        self._engine = EngineClient(engine) if isinstance(engine, str) else engine
        self._pause: PauseMode = pause
        self._audit_every, self._unaudited = audit_every, 0
        self.standing = Standing()
        self._stopping = threading.Event()
        self._stepping = threading.RLock()
        self._labelled: Position | None = None
        self._replica = replica or _replica_name(self._engine.url)
        self._may_write, self._beaten, self._last_beat = True, -BEAT_EVERY, ""

    def __enter__(self) -> "Follower":
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
            ledger.beat(self.bucket, entry)
        except AccessRefused:
            self._may_write = False
        except BucketError:  # the next one will tell
            return
        self._beaten, self._last_beat = time.monotonic(), str(entry)

    def step(self) -> UpdateReport | None:
        """Bring the server to the newest version, once. None when there was nothing to do, nothing is published, or the
        follower is being closed.

        Raises BucketError, FormatError, ChainError, ApplyError, EngineError; the server then serves what it served.
        """
        with self._stepping:
            if self._stopping.is_set():
                return None
            report = self._advance()
            self._unaudited += report is not None
            if self._audit_every and self._unaudited >= self._audit_every and not self._audit():
                report = self._advance() or report
            return report

    def audit(self) -> AuditReport:
        """Recompute every digest from live memory; see AuditReport. Weights that differ quarantine the server, and the
        next step makes them anew."""
        with self._stepping:
            return self._engine.audit()

    def _advance(self) -> UpdateReport | None:
        standing = self.standing
        try:
            target = self._target()
        except NotFound:
            return None
        standing.newest, standing.staged = target.version, None
        status = self._ready(target.run)
        standing.served, standing.looked, standing.problem = status.position, time.monotonic(), None
        if status.position == target:
            self._label(target)
            standing.joined = True
            return None
        if not self._stage(target):
            return None
        standing.staged = target.version
        report = self._commit(target)
        standing.served, standing.staged, standing.looked = target, None, time.monotonic()
        standing.joined = True
        return report

    def _audit(self) -> bool:
        """Whether live memory is what it should be; if not, the workers have quarantined themselves."""
        found, self._unaudited = self._engine.audit(), 0
        self.standing.audit = f"version {found.position.version if found.position else None}: " + (
            f"{len(found.mismatched)} tensors differ: {', '.join(found.mismatched[:4])}"
            if found.mismatched
            else "equal"
        )
        if found.mismatched:
            self._on_problem(WrongBase(f"{self._engine.url}, {self.standing.audit}; they are made anew"))
        return not found.mismatched

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
        try:
            return self._subscriber.chain.commit(self._pin).record.position
        except NotFound:
            raise Gap(
                f"{self.bucket.url}: version {self._pin} was never committed, or is pruned; pin another"
            ) from None

    def _ready(self, run: str) -> WorkerStatus:
        """The worker's status, attached to our bucket's run, generating, and with no session open."""
        status = self._engine.status()
        if (status.attached, status.run) != (self.bucket.url, run):
            self._labelled = None
            status = self._engine.init(self._url, self._trust.keys)
            _require(status)
        if not status.joined:
            self._engine.join(self._subscriber)
            status = self._engine.status()
        if status.torn:  # a follower was killed between some workers' writes and the others'
            self._engine.revert()
            status = self._engine.status()
        if status.quarantined:
            self._disown()
        if status.session_open:
            self._engine.finish(None)
        if self._engine.is_paused():
            self._engine.resume()
        return status

    def _stage(self, target: Position) -> bool:
        """Have the worker prepare the update while the server generates; False when we were closed meanwhile."""
        if self._labelled is None:  # a joiner: what it is about to read must not be pruned
            self._beat(need=0)
        accepted = self._engine.stage(self._url, target.version)
        while not self._stopping.is_set():
            status = self._engine.status()
            if not status.staging and accepted:
                _require(status)
                if status.workers > 1:
                    self._engine.vouch(self._subscriber, target)
                return True
            if not status.staging:  # what another follower had it stage is done
                accepted = self._engine.stage(self._url, target.version)
            self._stopping.wait(ASK_AGAIN)
        return False

    def _commit(self, target: Position) -> UpdateReport:
        """Swap the weights inside a pause that only scatters."""
        paused = time.perf_counter()
        status = self._swap(target)
        pause_ms = 1e3 * (time.perf_counter() - paused)
        _require(status)
        if status.position != target:
            self._subscriber.refresh()  # our copy of the commit may have been damaged on its way
            target = self._subscriber.chain.commit(target.version).record.position
        if status.position != target or status.applied is None:
            raise Quarantined(f"{self._engine.url} took {target} without an error and does not serve it: restart it")
        applied = {name: status.applied[name] for name in _APPLIED}
        report = UpdateReport(
            run=target.run,
            version=target.version,
            pause_ms=pause_ms,
            verified=True,
            publish_to_served_s=self._clock() - status.applied["created"],
            **applied,
        )
        self._on_update(report)
        return report

    def _swap(self, target: Position) -> WorkerStatus:
        """Pause, commit, name the version, resume. The session is closed and generation resumed whatever happens."""
        try:
            self._engine.start()
            self._engine.pause(self._pause, clear_cache=self._clear_cache)
            self._engine.update(self._url, target)
            status = self._engine.status()
            if status.torn:
                self._engine.revert()
            self._engine.finish(str(target) if status.position == target else None)
        except BaseException:
            self._let_go()
            raise
        self._engine.resume()
        self._labelled = status.position
        return status

    def _let_go(self) -> None:
        """End the session and the pause of an update that failed, as far as the server lets us; the next step looks
        again."""
        with suppress(EngineError):
            if self._engine.status().session_open:
                self._engine.finish(None)
        with suppress(EngineError):
            self._engine.resume()

    def _disown(self) -> None:
        """Have a server whose weights are in doubt stop naming a version, until an anchor has made them sure again."""
        self._labelled = None
        if self._engine.weight_version() != UNVERIFIED:
            self._engine.label(UNVERIFIED)

    def _label(self, position: Position) -> None:
        """A server that stands on a version without saying so (fresh from that very checkpoint, or left by a follower
        that was killed) is told its name."""
        if self._labelled != position and self._engine.weight_version() != str(position):
            self._engine.label(str(position))
        self._labelled = position


def _replica_name(engine_url: str) -> str:
    """This host and the server's address, as a key may hold them."""
    return re.sub(r"[^A-Za-z0-9]+", "-", f"{socket.gethostname()} {engine_url}")[:100].strip("-")


_APPLIED = ("from_version", "changed", "wire_bytes", "fetch_s", "stage_s", "write_ms")
"""what a report takes over from the worker's own record"""


def _require(status: WorkerStatus) -> None:
    if status.error is not None:
        raise named_error(status.error)
