"""A day of a fleet, played through: when each replica serves which version, and how often the bucket is asked.

All replicas move at once as arrays, one update each a round, so a thousand of them take seconds.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deltawire.sizing import constants as measured
from deltawire.sizing.forecast import DAY, anchor_every, fetch_seconds, upload_seconds
from deltawire.sizing.scenario import Scenario

Times = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class FleetReport:
    """A fleet over some time. Seconds of staleness are from a version's capture to its being served, over all versions
    that a replica served; versions of lag are counted when a replica looks. `busiest` is the most Hub API requests that
    one token made in five minutes."""

    replicas: int
    versions: int
    commits: int
    updates: int
    joins: int
    bytes_out: float
    staleness_p50: float
    staleness_p99: float
    lag_p50: float
    lag_p99: float
    busiest: float
    limit: int


@dataclass(frozen=True, slots=True)
class Day:
    """What a trainer does: when each version is captured, when it is in the bucket, and when commits are made."""

    seconds: float
    captured: Times
    committed: Times
    commits: Times


def simulate(scenario: Scenario, *, seconds: float = DAY, failures_a_day: float = 0.0, seed: int = 0) -> FleetReport:
    """Play a fleet through. `failures_a_day` is how often a replica is replaced by one that starts from nothing.

    Equal arguments give equal reports.
    """
    day = _trainer(scenario, seconds)
    fleet = _Fleet(scenario, day, np.random.default_rng(seed), failures_a_day)
    while fleet.round():
        pass
    windows = (day.commits // measured.HUB_WINDOW).astype(int)
    trainer = measured.TRAINER_REQUESTS * np.bincount(windows, minlength=fleet.asked.size)[: fleet.asked.size]
    return FleetReport(
        replicas=scenario.replicas,
        versions=day.captured.size,
        commits=day.commits.size,
        updates=fleet.updates,
        joins=fleet.joins,
        bytes_out=fleet.bytes_out,
        staleness_p50=_percentile(fleet.stale, 50),
        staleness_p99=_percentile(fleet.stale, 99),
        lag_p50=_percentile(fleet.lags, 50),
        lag_p99=_percentile(fleet.lags, 99),
        busiest=float((fleet.asked / scenario.tokens + trainer).max()) + _steady(scenario),
        limit=measured.HUB_LIMITS[scenario.plan],
    )


def _percentile(parts: list[Times], percent: float) -> float:
    """A percentile over several arrays; infinite where nothing was served at all."""
    values = np.concatenate([*parts, np.zeros(0)])
    return float(np.percentile(values, percent)) if values.size else math.inf


def _steady(scenario: Scenario) -> float:
    """What the replicas of one token ask in a window whatever is new: looks and heartbeats."""
    looks = measured.LOOK_REQUESTS * measured.HUB_WINDOW / scenario.poll
    beats = measured.HEARTBEAT_REQUESTS * measured.HUB_WINDOW / measured.HEARTBEAT_SECONDS
    return scenario.replicas / scenario.tokens * (looks + beats)


def _trainer(scenario: Scenario, seconds: float) -> Day:
    """A version each cadence; what is captured during an upload is folded into the next."""
    captured: Times = np.arange(0.0, seconds, scenario.cadence, dtype=np.float64)
    committed: Times = np.full(captured.size, np.inf)
    commits, done, free = [], 0, 0.0
    while done < captured.size:
        begins = max(free, float(captured[done]))
        end = int(np.searchsorted(captured, begins, side="right"))
        free = begins + upload_seconds(scenario, scenario.delta_bytes(end - done))
        committed[done:end], done = free, end
        commits.append(free)
    return Day(seconds, captured, committed, np.array([when for when in commits if when < seconds], np.float64))


class _Fleet:
    """Where each replica stands: the version it serves (-1: none), when it is free, and when it fails next."""

    def __init__(self, scenario: Scenario, day: Day, rng: np.random.Generator, failures_a_day: float) -> None:
        self._scenario, self._day, self._rng = scenario, day, rng
        self._between_failures = DAY / failures_a_day if failures_a_day else np.inf
        self._phase = rng.uniform(0, scenario.poll, scenario.replicas)
        self._free: Times = np.zeros(scenario.replicas)
        self._have: Numbers = np.full(scenario.replicas, -1)
        self._fails = self._next_failure(scenario.replicas)
        self._sizes = np.array([scenario.delta_bytes(behind) for behind in range(day.captured.size + 1)])
        self._join = scenario.checkpoint_bytes + scenario.delta_bytes(anchor_every(scenario) / 2)
        self.asked: Times = np.zeros(int(np.ceil(day.seconds / measured.HUB_WINDOW)))
        self.stale: list[Times] = []
        self.lags: list[Times] = []
        self.updates = self.joins = 0
        self.bytes_out = 0.0

    def round(self) -> bool:
        """Let every replica take the next update that it sees; False when the time is over for all."""
        newest_there = self._day.captured.size - 1
        there = self._day.committed[np.minimum(self._have + 1, newest_there)]
        looks = self._look(np.maximum(self._free, there))
        active = (self._have < newest_there) & (looks < self._day.seconds)
        failed = active & (looks >= self._fails)
        self._replace(failed)
        who = np.flatnonzero(active & ~failed)
        if who.size:
            self._update(who, looks[who])
        return bool(active.any())

    def _update(self, who: Numbers, looks: Times) -> None:
        """Fetch all that is there at a look, and serve it."""
        newest = np.searchsorted(self._day.committed, looks, side="right") - 1
        behind, joining = newest - self._have[who], self._have[who] < 0
        size = np.where(joining, self._join, self._sizes[behind])
        changed = np.minimum(size / self._scenario.width, self._scenario.weights) / self._scenario.workers
        fetched = fetch_seconds(self._scenario, 0.0) + size / self._scenario.download_bytes_per_second
        served = looks + fetched + measured.STAGE_SECONDS + measured.STAGE_SECONDS_A_CHANGE * changed
        self.stale.append((served - self._day.captured[newest])[~joining])
        self.lags.append(behind[~joining].astype(np.float64))
        self.updates += int((~joining).sum())
        self.joins += int(joining.sum())
        self.bytes_out += float(size.sum())
        windows = (looks // measured.HUB_WINDOW).astype(int)
        np.add.at(self.asked, windows, float(measured.READERS * measured.READER_REQUESTS))
        self._free[who], self._have[who] = served, newest

    def _look(self, earliest: Times) -> Times:
        """When each replica looks next, not before a time."""
        poll = self._scenario.poll
        looks: Times = np.ceil((earliest - self._phase) / poll) * poll + self._phase
        return looks

    def _replace(self, failed: npt.NDArray[np.bool_]) -> None:
        self._free[failed] = self._fails[failed]
        self._have[failed] = -1
        self._fails[failed] += self._next_failure(int(failed.sum()))

    def _next_failure(self, count: int) -> Times:
        if not np.isfinite(self._between_failures):
            return np.full(count, np.inf)
        return self._rng.exponential(self._between_failures, count)
