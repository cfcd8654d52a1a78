"""How a worker answers each verb of `rpc`, and any text that its server hands it: with JSON, whatever happens."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from deltawire.buckets import environment
from deltawire.errors import EngineError, EngineUnavailable, EngineUnsupported
from deltawire.live import messages as ask
from deltawire.live import rpc
from deltawire.live.worker import LiveWorker


@dataclass(frozen=True, slots=True)
class Seat:
    """A worker in its server: its rank, and whether a weight update was started there and not finished."""

    worker: LiveWorker
    rank: int
    session_open: bool


def respond(verb: str, text: str, find: Callable[[], Seat]) -> dict[str, Any]:
    """The answer to a request in JSON, as JSON will carry it. `find` finds the worker, or raises why there is none.

    Raises nothing: with several workers one that did would leave later answers off by one.
    """
    nonce, spoken = None, {"protocol": rpc.PROTOCOL, "deltawire": rpc.version()}
    try:
        asked = json.loads(text)
        if not isinstance(asked, dict):
            raise EngineError(f"a request is a JSON object, not {type(asked).__name__}")
        nonce = asked.get("nonce")
        said = _said(verb, asked, seat := find())
        envelope = {"nonce": nonce, "rank": seat.rank, "session_open": seat.session_open, **spoken}
        return {**msgspec.to_builtins(said), **envelope}
    except Exception as error:
        return {"nonce": nonce, "refused": {"kind": type(error).__name__, "message": str(error)}, **spoken}


def _said(verb: str, asked: dict[str, object], seat: Seat) -> msgspec.Struct:
    if (protocol := asked.get("protocol")) is not None:  # a call by hand leaves it out
        other = f"the follower, of deltawire {asked.get('deltawire')},"
        rpc.require_protocol(protocol, other, remedy="follow with the deltawire that the server runs")
    if verb not in ANSWERS:
        raise EngineUnsupported(f"deltawire {rpc.version()} knows no verb {verb!r}: follow with the same deltawire")
    return ANSWERS[verb](seat.worker, asked)


def status(worker: LiveWorker, request: ask.Request) -> ask.WorkerStatus:
    """Where the worker is, what the background does, what is staged, and the newest outcome."""
    return worker.status(request.lease)


def take(worker: LiveWorker, request: ask.Take) -> ask.Taken:
    """Give the lease to a follower, unless something happened to it since it was seen."""
    return ask.Taken(worker.take_lease(request.turn, request.token, request.holder))


def release(worker: LiveWorker, request: ask.Request) -> ask.Done:
    """The holder goes: the next follower need not wait."""
    worker.lease.release(request.lease)
    return ask.Done()


def holdings(worker: LiveWorker, request: ask.Request) -> ask.HeldParts:
    """Which parts of which tensors this worker holds, and their digests as of its last update."""
    return worker.live.require_attached().held_parts()


def set_position(worker: LiveWorker, request: ask.SetPosition) -> ask.Done:
    """Learn which version the workers' digests, taken together, are."""
    worker.require_lease(request.lease)
    attached = worker.live.require_attached()
    attached.position, attached.joined = request.position, True
    return ask.Done()


def stage(worker: LiveWorker, request: ask.Stage) -> ask.Accepted:
    """Start to stage a version in the background; the status says how it ended. The worker refuses it while it stages
    another."""
    worker.require_lease(request.lease)

    def job() -> None:
        if not worker.live.is_attached_to(request.bucket):
            raise EngineUnavailable(f"this worker is not attached to {request.bucket}: initialise it first")
        worker.live.make_ready(request.bucket, request.version)

    doing = f"staging version {request.version} of {request.bucket}"
    return _begun(lambda: worker.begin_recorded("stage", doing, job, request.bucket))


def staged(worker: LiveWorker, request: ask.Request) -> ask.Digested:
    """The digest of every part after what is staged, or as it is when nothing has to be done."""
    update = worker.live.staged
    return worker.live.require_attached().digested(update.plan if update else None)


def revert(worker: LiveWorker, request: ask.Request) -> ask.Reverted:
    """Take the last update back, unless it was confirmed: another worker could not write its part."""
    worker.require_lease(request.lease)
    return ask.Reverted(worker.live.take_back())


def placement(worker: LiveWorker, request: ask.Request) -> ask.Placed:
    """Every box of every tensor of the attached run; nothing while none is attached."""
    if (attached := worker.live.attached) is None:
        return ask.Placed({}, [], [])
    remade = [transform.prefix for transform in attached.live.remade()]
    return ask.Placed(attached.live.placement.boxes, list(attached.frozen), remade)


def environ(worker: LiveWorker, request: ask.SeeEnviron) -> ask.Environ:
    """What decides whether this process reaches a bucket; of secrets only whether they are set."""
    return ask.Environ(environment.seen(request.bucket, os.environ | worker.live.settings), os.getpid())


def begin(worker: LiveWorker, request: ask.Begin) -> ask.Accepted:
    """Start what takes long; `result` gives its answer. The worker refuses it while something else runs. The same
    ticket begins it once, however often it comes."""
    job, ticket, jobs = request.job, request.ticket, worker.jobs
    if isinstance(job, ask.DriftJob):
        worker.require_lease(request.lease)

    def work() -> None:
        try:
            found: ask.Audited | ask.Drifted | ask.Refusal = _found(worker, job)
        except Exception as error:
            found = ask.Refusal(type(error).__name__, str(error))
        jobs.finished(ticket, found)

    if jobs.asked == ticket:
        return ask.Accepted(True)
    doing = "auditing" if isinstance(job, ask.AuditJob) else "looking for drift"
    begun = _begun(lambda: worker.begin(doing, work))
    if begun.accepted:
        jobs.asked = ticket
    return begun


def result(worker: LiveWorker, request: ask.FetchResult) -> ask.Outcome:
    """What the job of a ticket found, once it is done."""
    worker.background.lend()
    return worker.jobs.outcome(request.ticket)


def _found(worker: LiveWorker, job: ask.AuditJob | ask.DriftJob) -> ask.Audited | ask.Drifted:
    if isinstance(job, ask.AuditJob):
        return worker.live.audit(job.bucket)
    return ask.Drifted(worker.live.drifted(job.names))


def _begun(begin_it: Callable[[], None]) -> ask.Accepted:
    """Whether a job was begun: False while another runs."""
    try:
        begin_it()
    except EngineUnavailable:
        return ask.Accepted(False)
    return ask.Accepted(True)


ANSWERS: Mapping[str, Callable[[LiveWorker, object], msgspec.Struct]] = dict(
    [
        rpc.STATUS.by(status),
        rpc.TAKE.by(take),
        rpc.RELEASE.by(release),
        rpc.HOLDINGS.by(holdings),
        rpc.SET_POSITION.by(set_position),
        rpc.STAGE.by(stage),
        rpc.STAGED.by(staged),
        rpc.REVERT.by(revert),
        rpc.PLACEMENT.by(placement),
        rpc.ENVIRON.by(environ),
        rpc.BEGIN.by(begin),
        rpc.RESULT.by(result),
    ]
)
"""of every verb, what answers it"""
