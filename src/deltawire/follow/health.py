"""Whether a replica may be sent requests: its server answers and serves a version, and one that is new enough."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltawire.follow.port import Answer, Port, Route, as_json
from deltawire.runlog.records import Position

SILENT_AFTER = 60.0
"""seconds without an answer after which what a server or a bucket last said is not believed any more"""


@dataclass
class Health:
    """What a follower knows of its server and its bucket, and since when. Times are seconds of `clock`."""

    clock: Callable[[], float] = time.monotonic
    patience: float = SILENT_AFTER
    """seconds without reading the bucket after which what is newest there is not known"""
    served: Position | None = None
    labelled: Position | None = None
    """the version that the server reports by our doing"""
    newest: int | None = None
    staged: int | None = None
    audit: str | None = None
    waiting: str | None = None
    """why there is nothing to serve yet"""
    waiting_since: float = 0.0
    problem: str | None = None
    problem_kind: str | None = None
    problem_since: float = 0.0
    joined: bool = False
    """whether what should be served was served, once since the follower began"""
    server_answered: float | None = None
    bucket_answered: float | None = None
    current_at: float | None = None
    """when what is served was last known to be what should be"""

    @property
    def lag(self) -> int | None:
        """Versions between the one served and the one it should be; None while either is not known."""
        if self.served is None or self.newest is None or self._silence(self.bucket_answered) > self.patience:
            return None
        return abs(self.newest - self.served.version)

    @property
    def age(self) -> float | None:
        """Seconds since what is served was last known to be what should be."""
        return None if self.served is None or self.current_at is None else self.clock() - self.current_at

    @property
    def server_silence(self) -> float:
        """Seconds since the server last answered, 0 when it was never asked."""
        return self._silence(self.server_answered)

    @property
    def problem_age(self) -> float:
        """Seconds that the problem has lasted."""
        return self.clock() - self.problem_since if self.problem is not None else 0.0

    def bucket_says(self, newest: int) -> None:
        """The bucket was read: this is the version to serve."""
        self.bucket_answered, self.newest, self.waiting = self.clock(), newest, None

    def server_says(self, served: Position | None, *, asked: float | None = None) -> None:
        """The server was asked, and serves this. An answer is ignored when a later question was answered before."""
        if asked is None or self.server_answered is None or asked >= self.server_answered:
            self.served, self.server_answered = served, self.clock()

    def is_current(self, served: Position) -> None:
        """The server serves what the bucket, when it was read last, said it should."""
        self.server_says(served)
        self.staged, self.joined, self.current_at = None, True, self.bucket_answered

    def holds(self) -> None:
        """What the server serves is what it should, though there is a newer version."""
        self.joined = self.joined or self.served is not None

    def waits(self, reason: str) -> None:
        """There is nothing to serve yet."""
        if self.waiting is None:
            self.waiting_since = self.clock()
        self.waiting, self.problem = reason, None

    def fails(self, error: Exception) -> None:
        """Something stands in the way; of the same kind as before, it still does."""
        kind = type(error).__name__
        if self.problem is None or kind != self.problem_kind:
            self.problem_since = self.clock()
        self.problem, self.problem_kind = str(error), kind

    def why_unready(self, max_staleness: int | None = None, max_age: float | None = None) -> str | None:
        """Why no request should be sent to the server, or None. `max_staleness` counts versions, `max_age` seconds.

        Without either, a silent bucket makes no server unready: it keeps what it serves.
        """
        if self.served is None or self.newest is None:
            return self.problem or self.waiting or "no version is served yet"
        if not self.joined:
            behind = abs(self.newest - self.served.version)
            return self.problem or f"joining: version {self.served.version} is served, {behind} behind"
        if self.server_silence > SILENT_AFTER:
            return f"the server has not answered for {self.server_silence:.0f} s"
        return self._why_old(f"version {self.served.version}", max_staleness, max_age)

    def _why_old(self, served: str, max_staleness: int | None, max_age: float | None) -> str | None:
        lag, age = self.lag, self.age or 0.0
        if max_staleness is not None and lag is None:
            return f"how far {served} is behind is not known: {self.trouble}"
        if max_staleness is not None and lag is not None and lag > max_staleness:
            return f"{served} is served, {lag} behind; at most {max_staleness} may be"
        if max_age is not None and age > max_age:
            return f"{served} was last known to be the newest {age:.0f} s ago; at most {max_age:g} s ago will do"
        return None

    @property
    def trouble(self) -> str | None:
        """What stands in the way, or that a bucket or server says nothing."""
        if self.problem is None and self.joined:
            for who, when, patience in (
                ("server", self.server_answered, SILENT_AFTER),
                ("bucket", self.bucket_answered, self.patience),
            ):
                if (silence := self._silence(when)) > patience:
                    return f"the {who} has not answered for {silence:.0f} s"
        return self.problem

    def answer(self, reason: str | None) -> dict[str, Any]:
        """What a router of requests reads."""
        return {
            "ready": reason is None,
            "reason": reason,
            "served": self.served,
            "lag": self.lag,
            "age": self.age,
            "problem": self.trouble,
        }

    def _silence(self, since: float | None) -> float:
        return 0.0 if since is None else self.clock() - since


class HealthRoute:
    """Answers GETs: /health is 200 while `why_unready` returns None, else 503 and the reason; /live is 200 as long as
    this process lives."""

    def __init__(self, why_unready: Callable[[], str | None], health: Health) -> None:
        self._why_unready, self._health = why_unready, health

    def says(self) -> dict[str, Any]:
        """What a router of requests reads."""
        return self._health.answer(self._why_unready())

    def answer(self, path: str, query: str) -> Answer | None:
        """See `Route.answer`."""
        if path == "/health":
            said = self.says()
            return as_json(200 if said["ready"] else 503, said)
        return as_json(200, {"live": True}) if path == "/live" else None


class HealthOfEach:
    """The health of several servers: /health/0 and on, in their order, answer as a `HealthRoute` of one. /health is 200
    while all of them are ready, and says of each what its own says. `each` are their routes, by address."""

    def __init__(self, each: Mapping[str, HealthRoute]) -> None:
        self._each = dict(each)

    def answer(self, path: str, query: str) -> Answer | None:
        """See `Route.answer`."""
        routes = [*self._each.values()]
        _, health, number = path.partition("/health/")
        if health and number.isascii() and number.isdecimal() and len(number) < 10 and int(number) < len(routes):
            return routes[int(number)].answer("/health", query)
        if path != "/health":
            return None
        said = {server: route.says() for server, route in self._each.items()}
        reasons = [f"{server}: {one['reason']}" for server, one in said.items() if not one["ready"]]
        answer = {"ready": not reasons, "reason": "; ".join(reasons) or None, "engines": said}
        return as_json(503 if reasons else 200, answer)


class HealthServer(Port):
    """`HealthRoute` on a port, and what else `routes` answer; / too is /health where none of them does.

    Raises OSError when the port cannot be had.
    """

    def __init__(
        self,
        port: int,
        why_unready: Callable[[], str | None],
        health: Health,
        *,
        host: str = "127.0.0.1",
        routes: Sequence[Route] = (),
    ) -> None:
        route = HealthRoute(why_unready, health)
        super().__init__([*routes, route, _At("/", "/health", route)], port, host=host)
        self.url += "health"


class _At:
    """Another path of a route."""

    def __init__(self, path: str, same_as: str, route: Route) -> None:
        self._path, self._same_as, self._route = path, same_as, route

    def answer(self, path: str, query: str) -> Answer | None:
        return self._route.answer(self._same_as, query) if path == self._path else None
