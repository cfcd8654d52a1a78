"""Several engines in memory, which fail or die when a test says so, and their followers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from memory_engine import MemoryEngine
from small import Fused, Shard, SmallRun

import deltawire as dw
from deltawire.errors import EngineUnavailable
from deltawire.follow.broadcast import Broadcast
from deltawire.follow.follower import Follower
from deltawire.follow.options import FollowOptions


class Member(MemoryEngine):
    """One of several. `journal` lists the calls of all in order. `dies_at` names the call at which it dies: then nobody
    answers, until `dead` is unset."""

    def __init__(self, name: str, journal: list[tuple[str, str]], *models: torch.nn.Module) -> None:
        super().__init__(*models)
        self.url, self.models, self._journal = name, models, journal
        self.dead, self.dies_at = False, ""

    def call_workers(self, method: str, argument: str) -> Sequence[object]:
        self._answer()
        return super().call_workers(method, argument)

    def is_paused(self) -> bool:
        self._answer()
        return super().is_paused()

    def weight_version(self) -> str:
        self._answer()
        return super().weight_version()

    def served(self) -> dict[str, torch.Tensor]:
        """The weights it generates with."""
        return self.models[0].served() if len(self.models) == 1 else Shard.served(list(self.models))

    @contextmanager
    def _called(self, name: str) -> Iterator[None]:
        self.dead = self.dead or name == self.dies_at
        self._answer()
        self._journal.append((self.url, name))
        with super()._called(name):
            yield

    def _answer(self) -> None:
        if self.dead:
            raise EngineUnavailable(f"{self.url} does not answer")


def own(run: SmallRun) -> dict[str, torch.Tensor]:
    """The weights of a run's first version, in memory of their own."""
    return {name: tensor.clone() for name, tensor in run.versions[0].items()}


class Fleet:
    """Engines `a`, `b` (of two workers) and `c` on a run's first version, and a broadcast to them."""

    def __init__(self, run: SmallRun, **options: object) -> None:
        self.run, self.journal = run, []
        shards = [Shard(own(run), rank) for rank in range(2)]
        self.engines = [
            Member("a", self.journal, Fused(own(run))),
            Member("b", self.journal, *shards),
            Member("c", self.journal, Fused(own(run))),
        ]
        self.reports: dict[str, list[int]] = {engine.url: [] for engine in self.engines}
        self.problems: dict[str, list[Exception]] = {engine.url: [] for engine in self.engines}
        self.followers = [
            Follower(
                run.url,
                engine,
                replica=engine.url,
                on_update=lambda report, to=engine.url: self.reports[to].append(report.version),
                on_problem=lambda error, to=engine.url: self.problems[to].append(error),
                **options,
            )
            for engine in self.engines
        ]
        self.broadcast = Broadcast(run.url, self.followers, FollowOptions(replica="all"))

    def __enter__(self) -> "Fleet":
        return self

    def __exit__(self, *exc: object) -> None:
        self.broadcast.close()

    def assert_serve(self, version: int, *, of: str = "abc") -> None:
        """These engines generate with a version's bits under its name, no session is open, and memory is right."""
        for engine in self.engines:
            if engine.url in of:
                assert dw.equal(engine.served(), self.run.versions[version]), engine.url
                assert (engine.paused, engine.session_open) == (False, False), engine.url
                assert engine.reported == f"{self.run.publisher.position.run}:{version}", engine.url
                assert engine.audit().mismatched == []
