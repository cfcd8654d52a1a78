"""Metrics for Prometheus: of a follower, on its health port, and of a publisher. Reading them asks no engine."""

import math
from collections.abc import Callable, Iterable
from typing import Any

from deltawire.follow.follower import UpdateReport
from deltawire.follow.health import Health
from deltawire.follow.port import Answer, Port
from deltawire.publish.reports import PublishReport, UploadReport

try:
    from prometheus_client import (
        CONTENT_TYPE_LATEST,
        CollectorRegistry,
        Counter,
        Gauge,
        Histogram,
        Metric,
        ProcessCollector,
        generate_latest,
    )
except ImportError:
    raise ImportError("metrics need prometheus_client: pip install 'deltawire[metrics]'") from None

PAUSES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
"""seconds: a pause is milliseconds, unless the KV cache is recomputed"""
SPANS = (0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
"""seconds: fetching, staging, publishing, and from publish to served"""


class Metrics:
    """What Prometheus reads at /metrics; a `Route`. `registry` is a `CollectorRegistry`, one of its own by default."""

    def __init__(self, registry: Any = None) -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        if registry is None:
            ProcessCollector(registry=self.registry)

    def answer(self, path: str, query: str) -> Answer | None:
        """See `Route.answer`."""
        return Answer(200, CONTENT_TYPE_LATEST, generate_latest(self.registry)) if path == "/metrics" else None

    def serve(self, port: int, *, host: str = "127.0.0.1") -> Port:
        """Answer /metrics on a port until what is returned is left. Raises OSError."""
        return Port([self], port, host=host)

    def _gauge(self, name: str, says: str, read: Callable[[], float | None]) -> None:
        def value() -> float:
            found = read()
            return math.nan if found is None else float(found)

        Gauge(name, says, registry=self.registry).set_function(value)

    def _counter(self, name: str, says: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(name, says, labels, registry=self.registry)

    def _histogram(self, name: str, says: str, buckets: tuple[float, ...] = SPANS) -> Histogram:
        return Histogram(name, says, registry=self.registry, buckets=buckets)


class FollowerMetrics(Metrics):
    """A follower's, by its health and its reports: call `updated` with each, and `failed` with each problem."""

    def __init__(self, health: Health, why_unready: Callable[[], str | None], registry: Any = None) -> None:
        super().__init__(registry)
        at = "deltawire_follower_"
        served = lambda: None if health.served is None else health.served.version  # noqa: E731
        self._gauge(f"{at}version", "Version that the server serves.", served)
        self._gauge(f"{at}newest_version", "Version that it should serve.", lambda: health.newest)
        self._gauge(f"{at}lag_versions", "Versions between the two.", lambda: health.lag)
        self._gauge(f"{at}age_seconds", "Seconds since the server was last known to be current.", lambda: health.age)
        self._gauge(f"{at}ready", "Whether requests may be sent to the server: 1 or 0.", lambda: why_unready() is None)
        silence = lambda: health.server_silence  # noqa: E731
        self._gauge(f"{at}engine_silence_seconds", "Seconds since the server last answered.", silence)
        self._updates = self._counter(f"{at}updates", "Versions that the server was brought to.")
        self._bytes = self._counter(f"{at}received_bytes", "Bytes of deltas and anchors that updates took.")
        self._changed = self._counter(f"{at}changed_elements", "Elements that updates changed.")
        self._problems = self._counter(f"{at}problems", "Problems, by the kind of error.", ("kind",))
        self._pause = self._histogram(f"{at}pause_seconds", "Pause of generation for an update.", PAUSES)
        self._fetch = self._histogram(f"{at}fetch_seconds", "Fetching what an update needs.")
        self._stage = self._histogram(f"{at}stage_seconds", "Staging an update while the server generates.")
        self._late = self._histogram(f"{at}publish_to_served_seconds", "From a version's publish until it is served.")

    def updated(self, report: Any) -> None:
        """A version is served: an `UpdateReport`, or an `AdapterReport`."""
        self._updates.inc()
        self._bytes.inc(report.wire_bytes)
        self._changed.inc(report.changed)
        self._fetch.observe(report.fetch_s)
        self._late.observe(max(0.0, report.publish_to_served_s))
        if isinstance(report, UpdateReport):
            self._pause.observe(report.pause_ms / 1e3)
            self._stage.observe(report.stage_s)

    def failed(self, error: Exception) -> None:
        """Something stands in the way."""
        self._problems.labels(type(error).__name__).inc()


class MetricsOfEach(Metrics):
    """The metrics of several followers in this process, each labelled by its `engine`."""

    def __init__(self) -> None:
        super().__init__()
        self._each: dict[str, FollowerMetrics] = {}
        self.registry.register(self)

    def add(self, name: str, health: Health, why_unready: Callable[[], str | None]) -> FollowerMetrics:
        """The metrics of one more."""
        self._each[name] = FollowerMetrics(health, why_unready, CollectorRegistry())
        return self._each[name]

    def collect(self) -> Iterable[Metric]:
        """Every metric once, with the samples of each follower; what a registry asks for."""
        families: dict[str, Metric] = {}
        for name, metrics in self._each.items():
            for family in metrics.registry.collect():
                whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                whole.samples += [one._replace(labels={"engine": name, **one.labels}) for one in family.samples]
        return families.values()


class PublisherMetrics(Metrics):
    """A publisher's, by its reports: `Publisher(on_publish=metrics.published, on_upload=metrics.uploaded)`."""

    def __init__(self, registry: Any = None) -> None:
        super().__init__(registry)
        at = "deltawire_publisher_"
        self._last: PublishReport | None = None
        self._committed: int | None = None
        self._gauge(f"{at}version", "Newest version captured.", lambda: self._of_last(lambda last: last.version))
        self._gauge(f"{at}committed_version", "Newest version in the bucket.", lambda: self._committed)
        density = lambda: self._of_last(lambda last: last.density)  # noqa: E731
        self._gauge(f"{at}changed_ratio", "Share of elements that the newest version changed.", density)
        self._gauge(f"{at}waiting_versions", "Versions not in the bucket yet.", self._waiting)
        held = lambda: self._of_last(lambda last: last.waiting_bytes if self._waiting() else 0)  # noqa: E731
        self._gauge(f"{at}waiting_bytes", "Bytes of memory that they take.", held)
        self._gauge(f"{at}failing", "Whether the last upload failed: 1 or 0.", self._failing)
        self._publishes = self._counter(f"{at}publishes", "Versions captured.")
        self._changed = self._counter(f"{at}changed_elements", "Elements that they changed.")
        self._uploads = self._counter(f"{at}uploads", "Commits made.")
        self._retries = self._counter(f"{at}upload_retries", "Tries that failed before a commit was made.")
        self._bytes = self._counter(f"{at}sent_bytes", "Bytes of the payloads of commits.")
        self._publish = self._histogram(f"{at}publish_seconds", "One publish, as the trainer waits for it.")
        self._compare = self._histogram(f"{at}compare_seconds", "Comparing the weights, a part of that.")
        self._upload = self._histogram(f"{at}upload_seconds", "Making a commit durable, behind the trainer.")

    def published(self, report: PublishReport) -> None:
        """A version was captured."""
        self._last = report
        self._publishes.inc()
        self._changed.inc(report.changed)
        self._publish.observe(report.seconds)
        self._compare.observe(report.compare_seconds)

    def uploaded(self, report: UploadReport) -> None:
        """A commit was made."""
        self._committed = report.position.version
        self._uploads.inc()
        self._retries.inc(report.attempts - 1)
        self._bytes.inc(report.wire_bytes)
        self._upload.observe(report.seconds)

    def _of_last(self, read: Callable[[PublishReport], float]) -> float | None:
        return None if self._last is None else read(self._last)

    def _waiting(self) -> float | None:
        if self._last is None:
            return None
        if self._committed is not None and self._committed >= self._last.version:
            return 0.0
        return float(self._last.waiting)

    def _failing(self) -> float | None:
        return None if self._last is None else float(self._last.problem is not None and self._waiting() != 0)
