"""How a run and its fleet are doing, as the bucket alone says: the trainer, each replica, and the chain of versions."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import msgspec

from deltawire.buckets.base import Bucket, Stat
from deltawire.errors import OtherRun
from deltawire.read.subscriber import Subscriber
from deltawire.runlog import heartbeats, planner
from deltawire.runlog.heartbeats import UNSAID, Heartbeat, TrainerBeat
from deltawire.runlog.keys import commit_key, derived_since
from deltawire.runlog.records import Commit

WINDOW = 30
"""newest versions that are shown"""
LINKS_EVERY = 30.0
"""seconds between two listings of folds and anchors"""
State = Literal["current", "behind", "unready", "silent"]


class TrainerStatus(msgspec.Struct, frozen=True):
    """The trainer, by its commits: version, step and age in seconds of the newest. Versions an hour and bytes are over
    the versions shown. `waiting` and `problem` are its own words of `heard_s` seconds ago, and None where it said
    nothing."""

    run: str
    version: int
    step: int | None
    age_s: float
    versions_per_hour: float | None
    bytes_per_version: float | None
    signed: bool
    waiting: int | None = None
    waiting_bytes: int | None = None
    problem: str | None = None
    heard_s: float | None = None
    ended: bool = False


class ReplicaStatus(msgspec.Struct, frozen=True):
    """One replica, by its heartbeat of `heard_s` seconds ago. `lag` counts versions, `lag_s` the seconds since the
    first version that it lacks was committed; both are None where it serves none of this run's."""

    replica: str
    state: State
    version: int | None
    lag: int | None
    lag_s: float | None
    heard_s: float
    pause_p50_ms: float | None
    pause_p99_ms: float | None
    wire_bytes: int | None
    fetched_bytes: int | None
    audit: str | None
    staged: int | None
    codecs: tuple[str, ...]
    why: str | None
    """why it is unready or silent"""


class VersionStatus(msgspec.Struct, frozen=True):
    """A committed version: when, in seconds since the epoch by the trainer's clock, and its bytes."""

    version: int
    parent: int | None
    at: float
    bytes: int
    step: int | None


class LinkStatus(msgspec.Struct, frozen=True):
    """A fold, or an anchor (`start` None), that leads to a version shown."""

    start: int | None
    end: int
    bytes: int


class FleetStatus(msgspec.Struct, frozen=True):
    """All of it, as seen at `at`, in seconds since the epoch by this host's clock."""

    bucket: str
    at: float
    trainer: TrainerStatus
    replicas: tuple[ReplicaStatus, ...]
    versions: tuple[VersionStatus, ...]
    links: tuple[LinkStatus, ...]


class Watcher:
    """Looks at a bucket again and again, and reads each record once. `trusted` are public keys, or files of them."""

    def __init__(
        self, bucket: Bucket, *, trusted: Iterable[str | Path] = (), clock: Callable[[], float] = time.time
    ) -> None:
        self.bucket, self._trusted, self._clock = bucket, tuple(trusted), clock
        self._subscriber = Subscriber(bucket, trusted=self._trusted)
        self._beats: list[tuple[Stat, Heartbeat]] = []
        self._links: tuple[LinkStatus, ...] = ()
        self._listed: tuple[str, float] = ("", 0.0)

    def __enter__(self) -> "Watcher":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of what was read."""
        self._subscriber.close()

    def look(self) -> FleetStatus:
        """How things are now. Raises NotFound while nothing is published; BucketError, FormatError, ChainError."""
        commits = self._recent()
        self._beats = heartbeats.read_all(self.bucket, self._beats)
        run, now = commits[-1].run, self._clock()
        said = heartbeats.read_trainer(self.bucket, run)
        return FleetStatus(
            bucket=self.bucket.url,
            at=now,
            trainer=trainer_status(commits, said, now),
            replicas=tuple(replica_status(stat, beat, commits, now) for stat, beat in self._beats),
            versions=tuple(
                VersionStatus(one.version, one.parent, one.created, one.wire_bytes, one.step) for one in commits
            ),
            links=self._links_to(commits, now),
        )

    def _recent(self) -> list[Commit]:
        """The newest commits, oldest first, of whichever run the bucket is at."""
        try:
            return self._subscriber.recent(WINDOW)
        except OtherRun:
            self._subscriber.close()
            self._subscriber = Subscriber(self.bucket, trusted=self._trusted)
            return self._subscriber.recent(WINDOW)

    def _links_to(self, commits: list[Commit], now: float) -> tuple[LinkStatus, ...]:
        """Folds and anchors among these versions, listed again now and then."""
        run, first = commits[-1].run, commits[0].version
        if self._listed[0] != run or not 0 <= now - self._listed[1] < LINKS_EVERY:
            listed = [stat for room, after in derived_since(run, first) for stat in self.bucket.list(room, after=after)]
            listed += [Stat(commit_key(run, one.version), 0, "") for one in commits]
            edges = planner.survey(listed, run, whole=0, on_chain=list)
            self._links = tuple(LinkStatus(edge.start, edge.end, edge.size) for edge in edges if edge.derived)
            self._listed = run, now
        return self._links


def trainer_status(commits: list[Commit], said: TrainerBeat | None, now: float) -> TrainerStatus:
    """The trainer, by the newest commits of its run, oldest first, and by what it says of itself."""
    first, newest = commits[0], commits[-1]
    hours = (newest.created - first.created) / 3600
    deltas = [commit.wire_bytes for commit in commits if commit.parent is not None]
    own = said or TrainerBeat(newest.run)
    old = own.committed is not None and own.committed < newest.version  # it has gone on since
    return TrainerStatus(
        run=newest.run,
        version=newest.version,
        step=newest.step,
        age_s=max(0.0, now - newest.created),
        versions_per_hour=(newest.version - first.version) / hours if hours > 0 else None,
        bytes_per_version=sum(deltas) / len(deltas) if deltas else None,
        signed=newest.signer is not None,
        waiting=None if said is None or old else said.waiting,
        waiting_bytes=None if said is None or old else said.waiting_bytes,
        problem=None if old else own.problem,
        heard_s=None if said is None or said.at is None else max(0.0, now - said.at),
        ended=own.ended and not old,
    )


def replica_status(stat: Stat, beat: Heartbeat, commits: list[Commit], now: float) -> ReplicaStatus:
    """One replica, by its heartbeat and the store's stamp of it, beside the newest commits, oldest first. It is silent
    only where both say so: one of the two clocks may be wrong."""
    newest = commits[-1]
    heard, silent = heartbeats.heard(stat, beat, now), heartbeats.is_silent(stat, beat, now)
    ours = beat.run == newest.run and beat.version is not None
    lacking = [one.created for one in commits if ours and one.version > (beat.version or 0)]
    lag = abs(newest.version - beat.version) if ours and beat.version is not None else None
    every = beat.every or UNSAID
    why = beat.error or beat.unready or (None if ours else "it serves no version of this run")
    state: State = "silent" if silent else "unready" if why else "behind" if lag else "current"
    return row_of(
        beat,
        state=state,
        version=beat.version if ours else None,
        lag=lag,
        lag_s=None if lag is None else max(0.0, now - lacking[0]) if lacking else 0.0,
        heard_s=heard,
        why=f"no heartbeat for {heard:.0f} s; it comes every {every:.0f} s" if silent else why,
    )


def row_of(
    beat: Heartbeat,
    *,
    state: State,
    version: int | None,
    lag: int | None,
    lag_s: float | None,
    heard_s: float,
    why: str | None,
) -> ReplicaStatus:
    """A replica as its heartbeat has it, with what its reader makes of that."""
    return ReplicaStatus(
        replica=beat.replica,
        state=state,
        version=version,
        lag=lag,
        lag_s=lag_s,
        heard_s=heard_s,
        pause_p50_ms=beat.pause_p50_ms,
        pause_p99_ms=beat.pause_p99_ms,
        wire_bytes=beat.wire_bytes,
        fetched_bytes=beat.fetched_bytes,
        audit=beat.audit,
        staged=beat.staged,
        codecs=beat.codecs,
        why=why,
    )
