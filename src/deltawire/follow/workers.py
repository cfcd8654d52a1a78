"""What a follower asks of all workers of an engine, whichever way they are reached: typed calls with typed errors."""

import json
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from deltawire.buckets import environment
from deltawire.errors import EngineUnavailable, Quarantined, recorded_error
from deltawire.follow.status import AuditReport, ServerStatus, as_one, audited, summed
from deltawire.live import messages as ask
from deltawire.live import rpc
from deltawire.live.coverage import disagreement
from deltawire.live.lease import Holder, View
from deltawire.read.subscriber import Subscriber
from deltawire.runlog.records import Position
from deltawire.weights.digest import root as root_of

Q = TypeVar("Q", bound=ask.Request)
A = TypeVar("A", bound=msgspec.Struct)
ASK_AGAIN = 0.02
"""seconds between looks at a worker that has just begun something"""


class WorkerCalls(ABC):
    """The verbs of `live.rpc`, asked of every worker of an engine at once. An engine says how they are reached.

    Every call raises EngineUnavailable when nobody answers, BadAnswer when what comes back is no answer to it, and
    Quarantined when it answers another question. EngineUnsupported says what the engine lacks, OtherProtocol that its
    workers run another deltawire. A call that raises has changed nothing, unless it says so.
    """

    url: str
    """where it is, for messages"""
    software: str = "the server"
    """what serves there, as its operator calls it, for messages"""
    token: str | None = None
    """says that a follower's calls are its own; see `take`"""
    stopping: threading.Event | None = None
    """set once the follower is closed: no wait for a busy worker goes on then"""

    @abstractmethod
    def call_workers(self, method: str, argument: str) -> Sequence[object]:
        """Call the method of that name of every worker with one string. What each answered, in any order, as JSON
        would carry it.

        A worker's method hands its string to `live.answers.respond`, which never raises. The workers must be called in
        the same order as every other call that reaches them: all decide by it who holds the lease.

        Raises EngineUnavailable, EngineUnsupported. Workers may then have done what was asked, or some of them.
        """

    def status(self) -> ServerStatus:
        """Where the workers are. Renews the lease of the follower that holds it."""
        return as_one(self.ask(rpc.STATUS, ask.Request()))

    def take(self, holder: Holder, seen: View) -> bool:
        """Drive this server from now on, with calls that carry our `token`. False when something happened to the lease
        since it was `seen`."""
        token = self.token or ""
        taken = [answer.taken for answer in self.ask(rpc.TAKE, ask.Take(token, holder, seen.turn))]
        if taken[0] and not all(taken):  # worker 0 decides
            self.ask(rpc.TAKE, ask.Take(token, holder, None))
        return taken[0]

    def release(self) -> None:
        """Let another follower drive this server at once."""
        self.ask(rpc.RELEASE, ask.Request())

    def join(self, subscriber: Subscriber) -> None:
        """Find out which version several workers' weights are, taken together, and have the workers know it. Raises
        EngineUnsupported when together they do not hold the run's tensors whole."""
        held = self.ask(rpc.HOLDINGS, ask.Request())
        digests, differing = summed(held, held)
        position = None if differing else subscriber.position_of(root_of(subscriber.run.table, digests))
        self.ask(rpc.SET_POSITION, ask.SetPosition(position))

    def stage(self, bucket: str, version: int) -> bool:
        """Ask the workers to stage a version in the background; False while one is staging another. The outcome is in
        `status`."""
        return all(answer.accepted for answer in self.ask(rpc.STAGE, ask.Stage(bucket, version)))

    def require_staged(self, subscriber: Subscriber, target: Position) -> None:
        """Compare what several workers have staged, taken together, with the commit; one that holds the whole model did
        so by itself.

        Raises WrongBase when live weights drifted (that worker is quarantined), BadDigest when the change does not lead
        there. Nothing was written.
        """
        staged = self.ask(rpc.STAGED, ask.Request())
        digests, differing = summed(self.ask(rpc.HOLDINGS, ask.Request()), staged)
        promised = subscriber.digests_at(target.version)
        wrong = [name for name, value in promised.items() if digests.get(name) != value or name in differing]
        if wrong:
            found = self._fetch(ask.DriftJob(wrong), ask.Drifted)
            raise disagreement(target, wrong, sorted({name for answer in found for name in answer.drifted}))

    def revert(self) -> None:
        """Take back an update that not every worker could write."""
        self.ask(rpc.REVERT, ask.Request())

    def audit(self, bucket: str | None = None) -> AuditReport:
        """Recompute every digest from live memory, and compare with the version the server says it serves, or (when it
        serves none) with the newest. `bucket` compares with another bucket than the one followed.

        Raises what kept a worker from it. A worker whose weights are not the version it serves is quarantined.
        """
        return audited(self._fetch(ask.AuditJob(bucket), ask.Audited))

    def placement(self) -> list[ask.Placed]:
        """Where each checkpoint tensor lives in the parameters of each worker. `frozen` names the tensors that the run
        never changes and it holds nothing of, `remade` the modules whose weights are remade at an update."""
        return self.ask(rpc.PLACEMENT, ask.Request())

    def why_unreached(self, bucket: str) -> str:
        """How the environment of the first worker differs from ours in what decides whether a bucket is reached; empty
        when it does not."""
        first = self.ask(rpc.ENVIRON, ask.SeeEnviron(bucket))[0]
        found = "; ".join(environment.differences(first.environ, environment.seen(bucket)))
        return found and f"; in that process, {first.pid}: {found}"

    def _fetch(self, job: ask.AuditJob | ask.DriftJob, kind: type[A]) -> list[A]:
        """What every worker finds by a job that takes long: each runs it in the background, and the server generates
        meanwhile."""
        started, ticket = time.monotonic(), secrets.token_hex(8)
        while not all(answer.accepted for answer in self.ask(rpc.BEGIN, ask.Begin(ticket, job))):
            self.rest(time.monotonic() - started)
        while True:
            answers = self.ask(rpc.RESULT, ask.FetchResult(ticket))
            for answer in answers:
                if isinstance(answer.found, ask.Refusal):
                    raise recorded_error(msgspec.to_builtins(answer.found))
            found: list[A] = [answer.found for answer in answers if isinstance(answer.found, kind)]
            if len(found) == len(answers):
                return found
            if all(answer.done for answer in answers):
                raise rpc.bad_answer(f"{self.url} result", TypeError("of another job"), repr(answers).encode())
            self.rest(time.monotonic() - started)

    def rest(self, seconds: float) -> None:
        """Wait before a worker that has been busy for some seconds is asked again. Raises EngineUnavailable once the
        follower that drives us is closed."""
        if self.stopping is None:
            time.sleep(nap(seconds))
        elif self.stopping.wait(nap(seconds)):
            raise EngineUnavailable(f"{self.url}: closed while a worker was busy, which it may still be")

    def ask(self, verb: rpc.Verb[Q, A], request: Q) -> list[A]:
        """What every worker answers, by rank; the nonce must come back from each."""
        nonce, asked = secrets.token_hex(8), f"{self.url} {verb.name}"
        sent = msgspec.structs.replace(
            request, nonce=nonce, lease=self.token, protocol=rpc.PROTOCOL, deltawire=rpc.version()
        )
        text = json.dumps(msgspec.to_builtins(sent))
        answers = [self._of(nonce, answer) for answer in self.call_workers(rpc.PREFIX + verb.name, text) or (None,)]
        for answer in answers:
            self._require_protocol(answer)
        for answer in answers:
            if (refused := answer.get("refused")) is not None:
                raise recorded_error(msgspec.to_builtins(rpc.answer_as(refused, ask.Refusal, asked)))
        ranked = sorted(answers, key=lambda answer: rpc.answer_as(answer, ask.Envelope, asked).rank)
        return [rpc.answer_as(answer, verb.answer, asked) for answer in ranked]

    def _of(self, nonce: str, answer: object) -> dict[str, Any]:
        """An answer, which is to the question of that nonce. Raises Quarantined."""
        if not isinstance(answer, dict) or answer.get("nonce") != nonce:
            shown = ascii(repr(answer)[: rpc.SHOWN])
            raise Quarantined(f"{self.url} answered another question than was asked ({shown}): restart it")
        return answer

    def _require_protocol(self, answer: dict[str, Any]) -> None:
        """Raise OtherProtocol unless the workers speak ours."""
        theirs = answer.get("deltawire")
        remedy = f"restart {self.software} with deltawire {rpc.version()}"
        other = f"{self.url}, which runs deltawire {theirs if isinstance(theirs, str) else 'of before'},"
        rpc.require_protocol(answer.get("protocol"), other, remedy=remedy)


def nap(seconds: float) -> float:
    """How long to wait before asking again after a job that has run for some seconds. It is a twentieth of that, but
    neither less than `ASK_AGAIN` nor more than half a second."""
    return min(0.5, max(ASK_AGAIN, seconds / 20))
