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


def board_of(*followers: LocalFollower) -> Board:
    """The page of one or several followers' bucket, read by connections of its own."""
    bucket, trusted = followers[0].bucket, followers[0].options.trusted
    rows = lambda: {name: row for one in followers for name, row in own_row(one).items()}  # noqa: E731
    return Board(Watcher(open_bucket(bucket.url), trusted=trusted), local=rows)


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


def metrics_of(followers: Mapping[str, LocalFollower]) -> Route:
    """The metrics of followers, which hear of their updates and problems from here on; of several they are labelled by
    the name of each. Without prometheus_client what says so."""
    try:
        from deltawire.fleet.metrics import FollowerMetrics, MetricsOfEach
    except ImportError:
        return NoMetrics()
    if len(followers) > 1:
        each = MetricsOfEach()
        for name, follower in followers.items():
            _hears(follower, each.add(name, follower.health, follower.beats.unready))
        return each
    (follower,) = followers.values()
    metrics = FollowerMetrics(follower.health, follower.beats.unready)
    _hears(follower, metrics)
    return metrics


def _hears(follower: LocalFollower, metrics: Any) -> None:
    """Have metrics hear of a follower's updates and problems."""
    options = follower.options

    def updated(report: Any) -> None:
        metrics.updated(report)
        options.on_update(report)

    def failed(error: Exception) -> None:
        metrics.failed(error)
        options.on_problem(error)

    follower.options = options.changed(on_update=updated, on_problem=failed)


class NoMetrics:
    """What /metrics says where prometheus_client is missing."""

    def answer(self, path: str, query: str) -> Answer | None:
        """See `Route.answer`."""
        missing = {"error": "metrics need prometheus_client: pip install 'deltawire[metrics]'"}
        return as_json(501, missing) if path == "/metrics" else None
