"""What a follower's health port shows beside health: the page, with its own replica as it knows it, and its metrics.

None of it asks the engine."""

from collections.abc import Mapping
from typing import Any, Protocol

import msgspec

from deltawire.buckets import open_bucket
from deltawire.buckets.base import Bucket
from deltawire.fleet.page import Board
from deltawire.fleet.status import State, Watcher, row_of
from deltawire.follow.beats import Beats
from deltawire.follow.health import Health
from deltawire.follow.options import FollowOptions
from deltawire.follow.port import Answer, Route, as_json


class LocalFollower(Protocol):
    """What is read of a follower."""

    bucket: Bucket
    health: Health
    options: FollowOptions
    beats: Beats


def board_of(follower: LocalFollower) -> Board:
    """The page of a follower's bucket, read by connections of its own."""
    watcher = Watcher(open_bucket(follower.bucket.url), trusted=follower.options.trusted)
    return Board(watcher, local=lambda: own_row(follower))


def own_row(follower: LocalFollower) -> Mapping[str, Mapping[str, Any]]:
    """What a follower knows of its replica, by the replica's name."""
    health, served = follower.health, follower.health.served
    beat = follower.beats.entry(served)
    state: State = "unready" if beat.unready else "behind" if health.lag else "current"
    row = row_of(
        beat,
        state=state,
        version=beat.version,
        lag=health.lag,
        lag_s=health.age if health.lag else 0.0,
        heard_s=0.0,
        why=beat.unready or health.trouble,
    )
    return {beat.replica: msgspec.to_builtins(row)}


def metrics_of(follower: LocalFollower) -> Route:
    """A follower's metrics, which hear of its updates and problems from here on; without prometheus_client what says
    so."""
    try:
        from deltawire.fleet.metrics import FollowerMetrics
    except ImportError:
        return NoMetrics()
    options, metrics = follower.options, FollowerMetrics(follower.health, follower.beats.unready)

    def updated(report: Any) -> None:
        metrics.updated(report)
        options.on_update(report)

    def failed(error: Exception) -> None:
        metrics.failed(error)
        options.on_problem(error)

    follower.options = options.changed(on_update=updated, on_problem=failed)
    return metrics


class NoMetrics:
    """What /metrics says where prometheus_client is missing."""

    def answer(self, path: str, query: str) -> Answer | None:
        """See `Route.answer`."""
        missing = {"error": "metrics need prometheus_client: pip install 'deltawire[metrics]'"}
        return as_json(501, missing) if path == "/metrics" else None
