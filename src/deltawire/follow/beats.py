"""The heartbeat that a follower keeps in the bucket: its figures, and what is written of them, and when."""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from deltawire.buckets.base import Bucket
from deltawire.errors import AccessRefused, BucketError
from deltawire.follow.health import Health
from deltawire.runlog import heartbeats
from deltawire.runlog.heartbeats import Heartbeat
from deltawire.runlog.pace import Pace
from deltawire.runlog.records import CODECS, Position
from deltawire.weights.blocks import Cut

KEPT = 100
"""updates whose pauses are remembered"""
R = TypeVar("R")


class Beats:
    """One replica's heartbeats, by its health. `unready` says why no request should be sent to it: set it
    where other limits hold than the health's own. `codecs` are those that it reads: set them where it learns of fewer,
    and `cuts` where it reads `class` by tiles that end there.
    """

    def __init__(self, bucket: Bucket, replica: str, health: Health, *, clock: Callable[[], float] = time.time) -> None:
        self._bucket, self._health, self._clock = bucket, health, clock
        self._last = Heartbeat(replica)
        self._may_write = True
        self._pauses: deque[float] = deque(maxlen=KEPT)
        self._fetched: int = 0
        self._newest: int | None = None
        self._needs = False
        self.pace = Pace(bucket.poll_seconds)
        self.unready: Callable[[], str | None] = health.why_unready
        self.codecs: tuple[str, ...] = CODECS
        self.cuts: dict[str, Cut] | None = None

    def hear(self, on_update: Callable[[R], None]) -> Callable[[R], None]:
        """`on_update`, whose reports' pauses and bytes go into the next heartbeats."""

        def heard(report: R) -> None:
            self._note(getattr(report, "pause_ms", None), getattr(report, "wire_bytes", 0))
            on_update(report)

        return heard

    def write(self, served: Position | None, *, need: int | None = None, error: str | None = None) -> None:
        """Write our heartbeat when it says something new or is getting old, as often as `pace` allows; what a joiner
        needs is written at once. A host that may only read has none."""
        self._needs = served is None and (self._needs or need is not None)
        entry = self.entry(served, need=0 if self._needs else need, error=error)
        unprotected = entry.need is not None and self._last.need is None
        if not self._may_write or not (unprotected or self.pace.is_due(news=_gist(entry) != _gist(self._last))):
            return
        try:
            heartbeats.beat(self._bucket, msgspec.structs.replace(entry, at=self._clock()))
        except AccessRefused:
            self._may_write = False
        except BucketError as problem:  # the next one will tell
            self.pace.refused(problem)
        else:
            self._last = entry
            self.pace.wrote(self._bucket)

    def entry(self, served: Position | None, *, need: int | None = None, error: str | None = None) -> Heartbeat:
        """What a heartbeat would say now; without the time."""
        health, pauses = self._health, self._pauses.copy()  # another thread may add to them meanwhile
        return Heartbeat(
            self._last.replica,
            run=served.run if served else None,
            version=served.version if served else None,
            root=served.root if served else None,
            need=need,
            staged=health.staged,
            lag=health.lag,
            audit=health.audit,
            error=error,
            every=self.pace.every,
            pause_p50_ms=percentile(pauses, 50),
            pause_p99_ms=percentile(pauses, 99),
            wire_bytes=self._newest,
            fetched_bytes=self._fetched,
            codecs=self.codecs,
            cuts=None if "class" in self.codecs else self.cuts,
            unready=self.unready(),
        )

    def _note(self, pause_ms: float | None, wire_bytes: int) -> None:
        if pause_ms is not None:
            self._pauses.append(pause_ms)
        self._newest = wire_bytes
        self._fetched += wire_bytes


def percentile(values: Sequence[float], share: int) -> float | None:
    """The smallest of these that `share` percent of them do not exceed; None of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share / 100 * len(ordered)) - 1)] if ordered else None


def _gist(entry: Heartbeat) -> Heartbeat:
    """What makes a heartbeat news: not by how many seconds a reason has grown."""
    return msgspec.structs.replace(entry, unready=None if entry.unready is None else "", every=None)
