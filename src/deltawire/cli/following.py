"""What `deltawire follow` runs: a follower of each server, the compactor beside them, and the port that shows them."""

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from deltawire.buckets import open_bucket
from deltawire.cli.options import host_and_port, listening_at
from deltawire.cli.telling import Teller
from deltawire.errors import NotFound

if TYPE_CHECKING:
    from deltawire.follow.broadcast import Broadcast
    from deltawire.follow.follower import Follower, UpdateReport
    from deltawire.follow.options import FollowOptions
    from deltawire.follow.several import Several
    from deltawire.vllm.adapters import AdapterFollower, AdapterReport

    Each = Follower | AdapterFollower
    All = Each | Several[Each] | Broadcast


class One(NamedTuple):
    """A server, as it was named but without a password, its follower, and what tells of it."""

    server: str
    follower: "Each"
    teller: Teller


class Following:
    """The followers of one bucket that a command runs, and what they tell."""

    def __init__(self, bucket: str, options: "FollowOptions", *, as_json: bool) -> None:
        self._bucket, self._json = bucket, as_json
        self._teller = Teller(as_json=as_json)
        self._options = options.changed(on_news=self._teller.news, on_problem=self._teller.problem)
        self._wake: Callable[[], None] = lambda: None
        self._each: list[One] = []

    @contextmanager
    def compacting(self, mirror: Path, key: Path | None) -> Iterator[None]:
        """Meanwhile a compactor is woken at each update."""
        from deltawire.upkeep.background import BackgroundCompactor
        from deltawire.upkeep.compactor import Compactor

        bucket, options = open_bucket(self._bucket), self._options
        compactor = Compactor(bucket, mirror, base=options.base, trusted=options.trusted, signing_key=key)
        with BackgroundCompactor(compactor, on_problem=self._teller.problem) as compacting:
            self._wake = compacting.wake
            yield

    @contextmanager
    def of(
        self, servers: Sequence[str], adapter: str | None, folder: Path | None, *, all_or_nothing: bool
    ) -> Iterator[None]:
        """Meanwhile these servers have followers, which `run` lets follow: each by itself, or all as one."""
        with ExitStack() as stack:
            for server in servers:
                shown = re.sub("//.*@", "//", server)  # a password may stand before an "@"
                teller = self._teller if len(servers) == 1 else Teller(as_json=self._json, bar=False, server=shown)
                follower = self._follower(server, adapter, folder, teller)
                stack.enter_context(follower)
                self._each.append(One(shown, follower, teller))
            self._all = self._as_one(all_or_nothing=all_or_nothing)
            stack.enter_context(self._all)
            yield

    @contextmanager
    def serving_health(self, address: str, max_staleness: int | None, max_age: float | None) -> Iterator[None]:
        """Meanwhile answer whether the servers are ready, show the page, and export metrics."""
        from deltawire.fleet.follower_port import board_of, metrics_of
        from deltawire.follow.health import HealthOfEach, HealthRoute, HealthServer

        each: dict[str, HealthRoute] = {}
        for server, follower, _ in self._each:
            health = follower.health
            follower.beats.unready = functools.partial(health.why_unready, max_staleness, max_age)
            each[server] = HealthRoute(follower.beats.unready, health)
        followers = {server: follower for server, follower, _ in self._each}
        first = self._each[0].follower
        host, port = host_and_port(address, "--health")
        with closing(board_of(*followers.values())) as board, ExitStack() as stack:
            routes = [board, metrics_of(followers), *([HealthOfEach(each)] if len(each) > 1 else [])]
            with listening_at(host, port, "--health"):
                opened = HealthServer(port, first.beats.unready, first.health, host=host, routes=routes)
            url = stack.enter_context(opened).url
            for follower in followers.values():
                stack.enter_context(follower.listening())
            page = url.removesuffix("health")
            self._teller.line("health", f"health at {url}, page at {page}", url=url, page=page)
            yield

    def run(self, *, once: bool) -> None:
        """Follow until a signal comes or, with `once`, until the newest version is served."""
        pin = self._options.pin
        for server, follower, _ in self._each:
            where = follower.bucket.url
            self._teller.line("following", f"{server} follows {where}", engine=server, bucket=where, pin=pin)
        health = self._each[0].follower.health if len(self._each) == 1 else None
        with self._teller.to_the_end(self._all.stop, health):
            if once:
                self._step()
            else:
                self._all.run()

    def _follower(self, server: str, adapter: str | None, folder: Path | None, teller: Teller) -> "Each":
        """What follows one server, a whole model or an adapter; a problem is printed with how long it has lasted."""
        from deltawire.follow.follower import Follower
        from deltawire.vllm.adapters import AdapterFollower
        from deltawire.vllm.client import EngineClient

        def problem(error: Exception) -> None:
            teller.problem(error, follower.health)

        def update(report: "UpdateReport | AdapterReport") -> None:
            teller.update(report)
            self._wake()

        options = self._options.changed(on_update=update, on_news=teller.news, on_problem=problem)
        follower: Each
        if adapter is None:
            follower = Follower(self._bucket, EngineClient(server), options)
        else:
            follower = AdapterFollower(self._bucket, server, adapter, folder=folder, options=options)
        return follower

    def _as_one(self, *, all_or_nothing: bool) -> "All":
        """All followers: the only one, a broadcast to all of them, or each on a thread of its own."""
        from deltawire.follow.broadcast import Broadcast
        from deltawire.follow.follower import Follower
        from deltawire.follow.several import Several

        followers = [one.follower for one in self._each]
        if len(followers) == 1:
            return followers[0]
        if all_or_nothing:
            return Broadcast(self._bucket, [one for one in followers if isinstance(one, Follower)], self._options)
        return Several(followers)

    def _step(self) -> None:
        """Bring every server to the newest version, and say which one had nothing to do."""
        from deltawire.follow.news import Current
        from deltawire.follow.several import Several

        everyone = self._all
        reports = everyone.step() if isinstance(everyone, Several) else [everyone.step()] * len(self._each)
        for (_, follower, teller), report in zip(self._each, reports, strict=True):
            health = follower.health
            if report is None and health.waiting is not None:
                raise NotFound(health.waiting)
            if report is None and health.served is not None:
                teller.news(Current(health.served.run, health.served.version))
