"""Follow a bucket and drive a server through each new version: stage while it generates, pause, write, resume.

The engine, not this process's memory, says where the server is; so a follower may die and start again at any time.
"""

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec

from deltawire.buckets import environment
from deltawire.errors import (
    BucketError,
    ChainError,
    EngineUnsupported,
    FormatError,
    Quarantined,
    WrongBase,
    some,
)
from deltawire.follow.engine import Engine
from deltawire.follow.lease import ServerLease
from deltawire.follow.loop import FollowLoop, replica_name
from deltawire.follow.news import Note
from deltawire.follow.options import FollowOptions
from deltawire.follow.server import DrivenServer
from deltawire.follow.status import AuditReport, ServerStatus
from deltawire.format.checkpoint import is_adapter
from deltawire.read.seen import given, place_of
from deltawire.runlog.figures import figures
from deltawire.runlog.records import Position


class UpdateReport(msgspec.Struct, frozen=True):
    """One update that the server serves now.

    `from_version` is None when it started from an anchor. `changed` counts elements that the first worker holds: where
    several hold the model, of its own parts. `pause_ms` is measured here, from opening the session to the answer to the
    resume; `write_ms` by the worker, around the writes alone. `verified` means that every changed tensor's new digest
    was equal to the commit's before anything was written. `publish_to_served_s` compares this host's clock with the
    publisher's.
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

    def as_metrics(self) -> dict[str, float]:
        """Its numbers as `deltawire/…`, for a trainer's logs."""
        return figures(self)


class Follower(FollowLoop[UpdateReport]):
    """Keeps one server at the newest version of one bucket. `options` are FollowOptions, as a record or by keyword.

    It alone drives the server's updates, by a lease that it renews. A second follower raises AnotherFollower, unless
    the first was silent for 15 seconds, is gone, or `take_over` is set. From then on the first one raises it. A pause
    or a session that it finds was left by a follower that was killed, and is ended.

    A server goes on trusting the keys that it was given alone when another follower comes that has none; `on_news`
    hears of it then. Weights that turn out to be no version are remade from the bucket.
    """

    def __init__(self, bucket_url: str, engine: Engine, options: FollowOptions | None = None, **keywords: Any) -> None:
        options = (options or FollowOptions()).changed(**keywords)
        state = (
            place_of(options.state, options.replica or replica_name(engine.url))
            if engine.outlives_follower
            else given(options.state)
        )
        super().__init__(bucket_url, options, server=engine.url, state=state)
        self.engine, self._url = engine, self.bucket.url
        engine.stopping = self.stopping
        self.settings = environment.endpoints(bucket_url) if options.pass_endpoint else {}
        """of the environment, that say where the bucket's store is: the workers receive them"""
        self.lease = ServerLease(engine, self.replica, self._url, take_over=options.take_over, stopping=self.stopping)
        self.server = DrivenServer(
            engine,
            self._url,
            self.lease,
            self.health,
            options,
            stopping=self.stopping,
            signed=bool(self.source.trust.keys),
        )
        self._trust_noted, self._unaudited = False, 0
        self.beats.codecs = ()  # its workers say it, once they are attached

    def run(self) -> None:
        """See `FollowLoop.run`. The lease is renewed meanwhile, whatever this thread waits for."""
        with self.lease.renewed():
            super().run()

    def audit(self) -> AuditReport:
        """Recompute every digest from live memory; see AuditReport. Weights that differ quarantine the server, and the
        next step remakes them."""
        with self._stepping:
            return self.engine.audit()

    def _let_go_of_server(self) -> None:
        self.lease.release()
        self.engine.close()

    def _advance(self, target: Position) -> UpdateReport | None:
        report = self._update(target)
        if not self.is_sound():
            report = self._update(target) or report
        return report

    def _ask_server(self) -> Position | None:
        return self.engine.status().position

    def _update(self, target: Position) -> UpdateReport | None:
        if not self.prepare(target):
            return None
        report = self.commit(target)
        self.health.is_current(target)
        return report

    def prepare(self, target: Position) -> bool:
        """Have the server stage a version while it generates, every digest compared with the commit. False when there
        is nothing to write: the server is at that version, or this follower was closed meanwhile.

        Raises what `step` does; the server serves what it served.
        """
        health = self.health
        if (found := self.server.take()) is None:
            return False
        self._require_whole_model()
        health.staged = None
        if (status := self._ready(found, target.run)) is None:
            return False
        health.server_says(status.position)
        self.beats.codecs, self.beats.cuts = status.codecs, status.cuts
        if status.position == target:
            self.server.label(target)
            health.is_current(target)
            return False
        if not self._stage(target):
            return False
        health.staged = target.version
        return True

    def is_sound(self) -> bool:
        """Whether live memory is what it should be, where it is time to look; if not, the workers have quarantined
        themselves."""
        every = self.options.audit_every
        if not every or self._unaudited < every:
            return True
        found, self._unaudited = self.engine.audit(), 0
        self.health.audit = f"version {found.position.version if found.position else None}: " + (
            f"{len(found.mismatched)} tensors differ: {some(found.mismatched)}" if found.mismatched else "equal"
        )
        if found.mismatched:
            self.options.on_problem(WrongBase(f"{self.engine.url}, {self.health.audit}; they are remade"))
        return not found.mismatched

    def _greet(self) -> None:
        if self.lease.held:
            return
        try:
            self.server.take()
        except EngineUnsupported:
            with suppress(BucketError, FormatError, ChainError):  # another option may be what is wrong
                self._require_whole_model()
            raise

    def _require_whole_model(self) -> None:
        run = self.source.subscriber.run
        if is_adapter(run.table):
            raise EngineUnsupported(f"{self._url}: run {run.run} is of an adapter: follow it with --adapter NAME")

    def _ready(self, status: ServerStatus, run: str) -> ServerStatus | None:
        """The server's status, attached to our bucket's run; None when we were closed meanwhile."""
        if (status.attached, status.run) != (self._url, run) or self._is_news_to(status):
            self.health.labelled = None
            if (
                status.reading in (None, self._url) and self.server.idle() is None
            ):  # another bucket's reading is abandoned
                return None
            self.engine.begin_init(self._url, self.source.trust.keys, self.settings, self.source.base)
            if (attached := self.server.idle()) is None:
                return None
            self.server.require(attached)
            status = attached
        if status.trusted and not self.source.trust.keys and not self._trust_noted:
            self._trust_noted = True
            self.options.on_news(Note(f"{self.engine.url} {self.server.keeps_keys}"))
        if not status.joined:
            self.engine.join(self.source.subscriber)
            status = self.engine.status()
        return status

    def _is_news_to(self, status: ServerStatus) -> bool:
        """Whether workers that are attached to our bucket do not have our keys, or our base."""
        keys, base = self.source.trust.keys, self.source.base
        return bool(keys and keys != set(status.trusted)) or (base is not None and str(base) != status.base)

    def _stage(self, target: Position) -> bool:
        """Have the workers prepare the update while the server generates; False when we were closed meanwhile."""
        self._keep_what_is_needed()
        while not self.engine.stage(self._url, target.version):  # busy with what another asked for
            if self.server.idle() is None:
                return False
        if (status := self.server.idle(target)) is None:
            return False
        self.server.require(status)
        if status.workers > 1:
            self.engine.require_staged(self.source.subscriber, target)
        return True

    def commit(self, target: Position) -> UpdateReport:
        """Have the server go on with what is staged. Its session is closed and generation resumed whatever happens."""
        try:
            written = self.write(target)
        except BaseException:
            self.server.let_go()
            raise
        return self.conclude(target, written)

    def write(self, target: Position) -> "Written":
        """Pause the server and write what is staged; see `DrivenServer.write`."""
        began = time.perf_counter()
        return Written(self.server.write(target), began)

    def conclude(self, target: Position, written: "Written") -> UpdateReport:
        """Name the version that was written, and let generation go on. Raises what the workers recorded."""
        status = written.status
        self.server.conclude(target, status)
        pause_ms = 1e3 * (time.perf_counter() - written.began)
        self.server.require(status)
        if status.position != target:
            self.source.refresh()  # our copy of the commit may have been damaged on its way
            target = self.source.subscriber.chain.commit(target.version).record.position
        applied = status.applied
        if status.position != target or applied is None:
            raise Quarantined(f"{self.engine.url} took {target} without an error and does not serve it: restart it")
        self._unaudited += 1
        report = UpdateReport(
            run=target.run,
            version=target.version,
            from_version=applied.from_version,
            changed=applied.changed,
            wire_bytes=applied.wire_bytes,
            fetch_s=applied.fetch_s,
            stage_s=applied.stage_s,
            pause_ms=pause_ms,
            write_ms=applied.write_ms,
            verified=True,
            publish_to_served_s=self.options.clock() - applied.created,
        )
        self.options.on_update(report)
        return report


@dataclass(frozen=True, slots=True)
class Written:
    """What the workers of a paused server said after a write; `began` is when its pause did, by `time.perf_counter`."""

    status: ServerStatus
    began: float
