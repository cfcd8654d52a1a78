"""What a follower says to a vLLM engine's workers, whichever way it reaches them: typed calls with typed errors."""

import json
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from deltawire.buckets import environment
from deltawire.errors import BadAnswer, EngineUnavailable, Quarantined, named_error
from deltawire.live.coverage import Union, disagreement
from deltawire.live.lease import Holder, View
from deltawire.live.rpc import (
    SHOWN,
    Accepted,
    Applied,
    Audited,
    Blamed,
    Digested,
    Environ,
    Finished,
    Holding,
    Placed,
    Problem,
    Refusal,
    Staged,
    Taken,
    Worker,
    converted,
    require_digests,
)
from deltawire.read.subscriber import Subscriber
from deltawire.runlog.records import Position
from deltawire.weights.digest import root as root_of

T = TypeVar("T")
ASK_AGAIN = 0.02
"""seconds between looks at a worker that has just begun something"""
PauseMode = Literal["keep", "wait", "abort"]
"""what becomes of requests in flight: kept where they are, finished first, or ended"""


class WorkerStatus(msgspec.Struct, frozen=True):
    """What the workers of a server say of themselves, as one.

    `attached` is the bucket they stand on, `run` that bucket's run; `position` what they serve, None while that is no
    committed version, `joined` whether that is known; `torn` when they stand at different ones. `error` is the newest
    failure, None after a success; `session_open` whether a weight update was started and not finished; `fetching` how
    many bytes of an anchor are there, and of how many, while one is being fetched. `doing` is what
    keeps a thread of theirs busy, for `doing_s` seconds so far, and `reading` the bucket that it reads for a follower;
    the server generates meanwhile. `lease` is worker 0's. `trusted` are public keys, and `base` a folder with the run's
    base checkpoint, that some follower gave them, kept until another gives others or the server ends.
    """

    attached: str | None
    run: str | None
    position: Position | None
    joined: bool
    staging: bool
    staged: Staged | None
    applied: Applied | None
    quarantined: bool
    session_open: bool
    error: Problem | None
    rank: int = 0
    workers: int = 1
    torn: bool = False
    fetching: tuple[int, int] | None = None
    lease: View = View()
    trusted: tuple[str, ...] = ()
    base: str | None = None
    doing: str | None = None
    reading: str | None = None
    doing_s: float = 0.0


def as_one(workers: list[WorkerStatus]) -> WorkerStatus:
    """The statuses of all workers of a server as that of one; a fact they disagree on is None."""
    first = workers[0]
    if len(workers) == 1:
        return first
    applied = [worker.applied for worker in workers if worker.applied]
    failed = next((worker for worker in workers if worker.error), first)
    busy = max(workers, key=lambda worker: worker.doing_s)
    positions = [worker.position for worker in workers]
    return WorkerStatus(
        attached=_agreed(worker.attached for worker in workers),
        run=_agreed(worker.run for worker in workers),
        position=_agreed(positions),
        joined=all(worker.joined for worker in workers),
        staging=any(worker.staging for worker in workers),
        staged=_agreed(worker.staged for worker in workers),
        applied=_slowest(applied) if applied else None,
        quarantined=any(worker.quarantined for worker in workers),
        session_open=any(worker.session_open for worker in workers),
        error=failed.error and {**failed.error, "message": f"worker {failed.rank}: {failed.error['message']}"},
        workers=len(workers),
        torn=any(position != positions[0] for position in positions),
        fetching=min((worker.fetching for worker in workers if worker.fetching), default=None),
        lease=first.lease,
        trusted=first.trusted,
        base=first.base,
        doing=busy.doing,
        reading=busy.reading,
        doing_s=busy.doing_s,
    )


def _slowest(applied: list[Applied]) -> Applied:
    """An update that all workers wrote: as long as the slowest took."""
    return {
        **applied[0],
        "fetch_s": max(worker["fetch_s"] for worker in applied),
        "stage_s": max(worker["stage_s"] for worker in applied),
        "write_ms": max(worker["write_ms"] for worker in applied),
    }


class AuditReport(msgspec.Struct, frozen=True):
    """Digests recomputed from a server's live memory, and the names that differ from the version it says it serves
    (or, when it serves none, the newest). `frozen` names the tensors that the run never changes and the server never
    loads: there is no memory of theirs to digest."""

    position: Position | None
    digests: dict[str, str]
    mismatched: list[str]
    workers: int = 1
    frozen: list[str] = []

    @property
    def tensors(self) -> int:
        """Tensors digested."""
        return len(self.digests)


def audited(answers: Sequence[object]) -> AuditReport:
    """What the workers of a server found, taken together: every copy compared, one counted, the union complete. Raises
    BadAnswer."""
    found = [converted(answer, Audited, "audit") for answer in answers]
    union = _union(found, found)
    digests, differing = union.digests([worker.values for worker in found])
    promised = {name: int(value, 16) for name, value in found[0].promised.items()}
    wrong = {name for worker in found for name in worker.drifted} | set(differing)
    wrong |= {name for name, value in promised.items() if digests.get(name) != value}
    return AuditReport(
        _agreed(worker.position for worker in found),
        {name: f"{value:016x}" for name, value in digests.items() if name not in union.left_out},
        [name for name in promised if name in wrong],
        len(found),
        union.left_out,
    )


class Engine(ABC):
    """One vLLM engine and all its workers.

    Every call raises EngineUnavailable when nobody answers, BadAnswer when what is answered is no answer to it,
    EngineUnsupported when the engine lacks what it takes, and Quarantined when an answer is to another question.
    """

    url: str
    """where it is, for messages"""
    outlives_follower: bool = True
    """whether it is still there when the process of its follower has ended; what it saw is then remembered in a file"""
    token: str | None = None
    """says that a follower's calls are its own; see `take`"""
    stopping: threading.Event | None = None
    """set once whoever drives the engine is closed: no wait for a busy worker goes on then"""

    @abstractmethod
    def close(self) -> None:
        """Let go of it; it goes on as it is."""

    @abstractmethod
    def call_workers(self, method: str, argument: str) -> list[Any]:
        """Call a method of every worker with one string; what each answered."""

    @abstractmethod
    def begin_init(
        self, bucket: str, trusted: Iterable[str] = (), settings: Mapping[str, str] = {}, base: Path | None = None
    ) -> None:
        """Have the workers attach to a bucket, on threads of their own: placement is probed and live weights digested.
        The outcome is in `status`, once nothing is being done. `settings` of the environment tell them where the store
        is; `base` is a folder on their host with the run's base checkpoint."""

    @abstractmethod
    def start(self) -> None:
        """Open a weight update session."""

    @abstractmethod
    def update(self, bucket: str, target: Position) -> None:
        """Commit what is staged. No error says nothing: read `status` for the outcome."""

    @abstractmethod
    def finish(self, weight_version: str | None) -> None:
        """Close the session; with a version the engine reports it from now on."""

    @abstractmethod
    def pause(self, mode: PauseMode, *, clear_cache: bool) -> None:
        """Hold generation."""

    @abstractmethod
    def resume(self) -> None:
        """Let generation go on."""

    @abstractmethod
    def is_paused(self) -> bool:
        """Whether generation is held."""

    @abstractmethod
    def label(self, weight_version: str) -> None:
        """Have the engine report this version from now on; no weight moves."""

    @abstractmethod
    def weight_version(self) -> str:
        """What the engine says it serves."""

    def status(self) -> WorkerStatus:
        """Where the workers stand."""
        return as_one(self._ask("status", {}, WorkerStatus))

    def init(self, bucket: str, trusted: Iterable[str] = ()) -> WorkerStatus:
        """Attach the workers to a bucket, and wait for it however long it takes. Its outcome is the status."""
        self.begin_init(bucket, trusted)
        while (status := self.status()).staging:
            self._rest(status.doing_s)
        return status

    @property
    def carried(self) -> dict[str, str]:
        """What every call carries that changes something."""
        return {"lease": self.token} if self.token else {}

    def take(self, holder: Holder, seen: View) -> bool:
        """Drive this server from now on, with calls that carry our `token`. False when something happened to the lease
        since it was `seen`."""
        claim = {"token": self.token, "holder": msgspec.to_builtins(holder)}
        taken = [answer.taken for answer in self._ask("take", {**claim, "turn": seen.turn}, Taken)]
        if taken[0] and not all(taken):  # worker 0 decides
            self._ask("take", {**claim, "turn": None}, Taken)
        return taken[0]

    def release(self) -> None:
        """Let somebody else drive this server at once."""
        self._ask("release", {}, Worker)

    def join(self, subscriber: Subscriber) -> None:
        """Find out which version several workers' weights are, taken together, and tell them. Raises EngineUnsupported
        when together they do not hold the run's tensors whole."""
        held = self._ask("holdings", {}, Holding)
        digests, differing = _summed(held, held)
        position = None if differing else subscriber.position_of(root_of(subscriber.run.table, digests))
        self._ask("stand", {"position": msgspec.to_builtins(position)}, Worker)

    def stage(self, bucket: str, version: int) -> bool:
        """Ask the workers to stage a version on threads of their own; False while one is staging another. The outcome
        is in `status`."""
        return all(answer.accepted for answer in self._ask("stage", {"bucket": bucket, "version": version}, Accepted))

    def vouch(self, subscriber: Subscriber, target: Position) -> None:
        """Compare what several workers have staged, taken together, with the commit; one that holds the whole model did
        so by itself. Raises WrongBase when live weights
        drifted (that worker is quarantined), BadDigest when the change does not lead there."""
        staged = self._ask("staged", {}, Digested)
        digests, differing = _summed(self._ask("holdings", {}, Holding), staged)
        promised = subscriber.digests_at(target.version)
        wrong = [name for name, value in promised.items() if digests.get(name) != value or name in differing]
        if wrong:
            blamed = self._fetch("blame", {"names": wrong}, Blamed)
            raise disagreement(target, wrong, sorted({name for answer in blamed for name in answer.drifted}))

    def revert(self) -> None:
        """Take back an update that not every worker could write."""
        self._ask("revert", {}, Worker)

    def audit(self, bucket: str | None = None) -> AuditReport:
        """Recompute every digest from live memory, and compare with the version the server says it serves, or (when it
        serves none) with the newest. `bucket` compares with another bucket than the one followed. Raises what kept a
        worker from it."""
        return audited(self._fetch("audit", {"bucket": bucket} if bucket else {}, dict[str, Any]))

    def why_unreached(self, bucket: str) -> str:
        """How the environment of the first worker differs from ours in what decides whether a bucket is reached; empty
        when it does not."""
        first = self._ask("environ", {"bucket": bucket}, Environ)[0]
        found = "; ".join(environment.differences(first.environ, environment.seen(bucket)))
        return found and f"; in that process, {first.pid}: {found}"

    def placement(self) -> list[dict[str, Any]]:
        """Of each worker, where each checkpoint tensor lives in its parameters (`placement`), the tensors that the run
        never changes of which it holds nothing (`frozen`), and the modules whose weights are made anew at an update
        (`remade`)."""
        answers = self._ask("placement", {}, dict[str, Any])
        for answer in answers:
            converted(answer, Placed, f"{self.url} placement")
        return answers

    def _fetch(self, verb: str, request: dict[str, Any], kind: type[T]) -> list[T]:
        """What every worker answers to a question that takes long: each looks for it on a thread of its own, and the
        server generates meanwhile."""
        started, ticket = time.monotonic(), secrets.token_hex(8)

        job = {"verb": verb, "ticket": ticket, "request": request}
        while not all(answer.accepted for answer in self._ask("begin", job, Accepted)):
            self._rest(time.monotonic() - started)
        while True:
            answers = self._ask("result", {"ticket": ticket}, dict[str, Any])
            asked = f"{self.url} {verb}"
            if all(converted(answer, Finished, asked).done for answer in answers):
                return [converted(answer, kind, asked) for answer in answers]
            self._rest(time.monotonic() - started)

    def _rest(self, seconds: float) -> None:
        """Wait before a worker that has been busy for some seconds is asked again. Raises EngineUnavailable once
        whoever drives us is closed."""
        if self.stopping is None:
            time.sleep(nap(seconds))
        elif self.stopping.wait(nap(seconds)):
            raise EngineUnavailable(f"{self.url}: closed while a worker was busy, which it may still be")

    def _ask(self, method: str, request: dict[str, Any], kind: type[T]) -> list[T]:
        """What every worker answers, by rank; the nonce must come back from each."""
        nonce, asked = secrets.token_hex(8), f"{self.url} {method}"
        answers = self.call_workers(f"deltawire_{method}", json.dumps({**request, **self.carried, "nonce": nonce})) or [
            None
        ]
        for answer in answers:
            if not isinstance(answer, dict) or answer.get("nonce") != nonce:
                shown = ascii(repr(answer)[:SHOWN])
                raise Quarantined(f"{self.url} answered another question than was asked ({shown}): restart it")
        for answer in answers:
            if (refused := answer.get("refused")) is not None:
                raise named_error(msgspec.to_builtins(converted(refused, Refusal, asked)))
        ranked = sorted(answers, key=lambda answer: converted(answer, Worker, asked).rank)
        return [converted(answer, kind, asked) for answer in ranked]


def opening(
    bucket: str, trusted: Iterable[str], settings: Mapping[str, str], base: Path | None = None
) -> dict[str, Any]:
    """What workers are asked for when they are to attach."""
    return {
        "bucket": bucket,
        **({"trusted": sorted(trusted)} if trusted else {}),
        **({"settings": dict(settings)} if settings else {}),
        **({"base": str(base)} if base is not None else {}),
    }


def nap(seconds: float) -> float:
    """How long to wait before asking again after a job that has run for some seconds: a little, then a twentieth of
    that, at most half a second."""
    return min(0.5, max(ASK_AGAIN, seconds / 20))


def _union(held: Sequence[Holding], digested: Sequence[Digested]) -> Union:
    """What several workers hold together, each digest of it at hand. Raises BadAnswer when they do not speak of the
    same tensors and parts."""
    if len(held) != len(digested) or any(worker.sizes != held[0].sizes for worker in held):
        raise BadAnswer("the workers of a server do not agree which tensors there are: restart it")
    try:
        for worker, digests in zip(held, digested, strict=True):
            require_digests(worker.parts, digests.digests)
    except ValueError as error:
        raise BadAnswer(f"a worker did not digest what it holds ({error}): restart the server") from None
    frozen = {name: int(value, 16) for name, value in held[0].frozen.items()}
    return Union(held[0].sizes, [worker.parts for worker in held], frozen=frozen)


def _summed(held: Sequence[Holding], digested: Sequence[Digested]) -> tuple[dict[str, int], list[str]]:
    """Every tensor's digest, of what several workers hold together, and the names whose copies differ. Raises
    BadAnswer."""
    return _union(held, digested).digests([worker.values for worker in digested])


def _agreed(values: Iterable[T | None]) -> T | None:
    first, *others = values
    return first if all(other == first for other in others) else None
