"""What one worker does with its part of the weights when asked: attach, stage, write, confirm, take back, audit.

A worker that holds the whole model compares with commits by itself. Of several, each holds parts, and only all together
can be compared: a follower adds up what they report, tells them where they stand, and vouches for what they write.

Nothing that a server asks of it raises. With several workers an exception in one leaves every later answer off by one
behind HTTP 200, so failures are kept here and read back by `answer_status`. A failure leaves weights and version.

Weights change on the server's own thread alone. What waits for a store or reads all of memory (attaching, staging,
auditing) is a job in the background: it only reads the weights, and no update is written meanwhile.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import torch

from deltawire.buckets import Bucket, environment, open_bucket
from deltawire.errors import ChainError, EngineError, EngineUnavailable, EngineUnsupported, FormatError, WrongBase
from deltawire.live import staging
from deltawire.live.attached import Attached, as_hex, attach, whole_as_hex
from deltawire.live.background import Background
from deltawire.live.lease import Holder, Lease
from deltawire.live.post_load import AfterLoading
from deltawire.live.staging import Plan
from deltawire.read.subscriber import Subscriber
from deltawire.runlog.log import current_run
from deltawire.runlog.records import Position
from deltawire.runlog.signing import Trust, trust

PLAIN_WAIT = 2.0
"""seconds that the plain POST of a version which nobody staged holds the server; later it is to be posted again"""
_NOBODY_COMPARED = "only a follower can compare what all workers hold together with the commit: run `deltawire follow`"

S = TypeVar("S", bound=msgspec.Struct)


class Target(msgspec.Struct, frozen=True):
    """What an update asks for; `root` is what a follower found all workers together to lead to."""

    bucket: str
    version: int
    root: str | None = None
    lease: str | None = None


class Opening(msgspec.Struct, frozen=True):
    """What attaching asks for: a bucket, the public keys to trust from here on, settings of the environment that say
    where the bucket's store is, and a folder of this host with the base checkpoint of its run."""

    bucket: str
    trusted: tuple[str, ...] = ()
    settings: dict[str, str] = {}
    base: str | None = None
    lease: str | None = None


class Job(msgspec.Struct, frozen=True):
    """A question that takes long, and a word of the asker's by which to fetch the answer."""

    verb: Literal["audit", "blame"]
    ticket: str
    request: dict[str, Any] = {}


class Replica:
    """The weights of `model`, followed through one bucket at a time.

    `loading` is what vLLM changed after loading; None means that nobody watched, and no bucket is attached. `workers`
    hold the model together. `copies` of it serve (data parallelism). `compiled` models keep what they were traced with.
    `synchronize` waits until what was written is on the device; `on_thread` prepares a thread that uses it.

    `attach` and `commit` return when it is done. A server calls `begin_attach` and `update` instead, which leave to the
    background what may take long.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        loading: AfterLoading | None,
        workers: int = 1,
        copies: int = 1,
        compiled: bool = False,
        synchronize: Callable[[], None] = lambda: None,
        on_thread: Callable[[], None] = lambda: None,
    ) -> None:
        self._model, self._loading = model, loading
        self._workers, self._copies, self._compiled = workers, copies, compiled
        self._synchronize = synchronize
        self._attached: Attached | None = None
        self._trust = Trust()
        self._settings: dict[str, str] = {}
        self._base: str | None = None
        self._plan: tuple[Attached, Position | None, Plan] | None = None
        self._problem: dict[str, str] | None = None
        self._refusal: dict[str, str] | None = None
        """what those who do not hold the lease are told"""
        self.lease = Lease()
        self._applied: dict[str, Any] | None = None
        self._quarantined = False
        self._background = Background(on_thread)
        self._asked, self._answer = "", ("", dict[str, Any]())

    def attach(self, url: str, trusted: Iterable[str] = (), base: Path | str | None = None) -> None:
        """Stand on the run that a bucket's HEAD names: probe placement, digest live weights, find the version they
        are. With `trusted` public keys every record must be signed by one, from here on. `base` is a folder of this
        host with the run's base checkpoint."""
        with self.recording("attach"), self._background.alone():
            self._attach(url, trusted, None if base is None else str(base))

    def begin_attach(self, request: object) -> None:
        """Begin to attach to what an `Opening` asks for, in the background; the status tells the outcome."""
        with self.recording("attach", clear=False):
            asked = _convert(request, Opening)
            if not self._may_change(asked.lease, "attach"):
                return

            doing = self._background.doing
            if doing and doing.bucket not in (None, asked.bucket):  # it may hang, and nobody wants it any more
                self._background.abandon()
                self.close()

            def job() -> None:
                with self.recording("attach"):
                    if self._settings != asked.settings:
                        self._settings = asked.settings
                        self.close()
                    self._attach(asked.bucket, asked.trusted, asked.base)

            self._begin(f"opening {asked.bucket}", job, bucket=asked.bucket)

    def commit(self, request: object) -> None:
        """Write the plan staged for {"bucket", "version"}; without one stage it first."""
        self._settle()
        with self.recording("update"), self._background.alone():
            target = _convert(request, Target)
            if not self._is_ready(target):
                self._require_alone(target)
                self._make_ready(target)
            self._write_ready(target)

    def update(self, request: object) -> None:
        """`commit` for a server. What nobody staged (a plain POST, no follower) is staged in the background. The server
        waits at most `PLAIN_WAIT` seconds for that, and for what was being done before."""
        with self.recording("update", clear=False):
            target = _convert(request, Target)
            if not self._may_change(target.lease, "update"):
                return
            self._settle()
            if not self._is_ready(target):
                self._require_alone(target)
                self._background.wait(PLAIN_WAIT)  # for what an earlier POST began: to attach, say
            if not self._is_ready(target):
                self._begin_staging(target, lambda: self._make_ready(target))
                if not self._background.wait(PLAIN_WAIT):
                    raise EngineUnavailable(
                        f"version {target.version} is being staged: post it again when the status says it is staged"
                    )
                if self._problem is not None:
                    return
            with self._background.alone():
                self._write_ready(target)
            self._problem = None

    def confirm(self) -> None:
        """Keep the last update: what it replaced is forgotten. Leaves the newest outcome to be read."""
        with self.recording("finish", clear=False):
            self._keep()

    def _keep(self) -> None:
        self._settle()

    def _settle(self) -> None:
        """An update that nobody confirmed or took back stays: only the next one can be taken back."""
        if self._attached is not None:
            self._attached.confirm()

    def close(self) -> None:
        """Forget the bucket and its downloads; the weights stay as they are."""
        attached, self._attached, self._plan = self._attached, None, None
        if attached is not None:
            attached.subscriber.close()

    @property
    def position(self) -> Position | None:
        """The version these weights are, None while that is no committed one or in doubt."""
        return self._attached.position if self._attached and not self._quarantined else None

    def answer_status(self, request: dict[str, Any]) -> dict[str, Any]:
        """Where this worker stands, what the background does, what is staged, and the newest outcome."""
        self._background.lend()
        view = self.lease.view(request.get("lease"))
        doing = self._background.doing  # before the outcome, which is set before it ends
        attached, staged = self._attached, self._plan
        return {
            "attached": attached.subscriber.bucket.url if attached else None,
            "run": attached.subscriber.run.run if attached else None,
            "position": msgspec.to_builtins(self.position),
            "joined": bool(attached and attached.joined),
            "staging": doing is not None,
            "doing": doing and doing.what,
            "doing_s": doing.seconds if doing else 0.0,
            "reading": doing and doing.bucket,
            "staged": _facts(staged[2]) if staged else None,
            "applied": self._applied,
            "quarantined": self._quarantined,
            "error": self._problem if view.mine else self._refusal or self._problem,
            "lease": msgspec.to_builtins(view),
            "trusted": sorted(self._trust.keys),
            "base": self._base,
            "fetching": attached.subscriber.fetching if attached else None,
        }

    def answer_take(self, request: dict[str, Any]) -> dict[str, Any]:
        """Give the lease to {"holder"}, whose calls carry {"token"}, unless something happened to it since {"turn"}."""
        holder = msgspec.convert(request["holder"], Holder)
        if taken := self.lease.take(request["turn"], request["token"], holder):
            self._refusal = None
        return {"taken": taken}

    def answer_release(self, request: dict[str, Any]) -> dict[str, Any]:
        """The holder goes: whoever comes next need not wait."""
        self.lease.release(request["lease"])
        return {}

    def answer_stage(self, request: dict[str, Any]) -> dict[str, Any]:
        """Start staging {"bucket", "version"} on a thread of our own; ask the status for its outcome. Not accepted
        while another is being staged."""
        self._require_lease(request)
        target = _convert(request, Target)

        def job() -> None:
            if not self._stands_on(target.bucket):
                raise EngineUnavailable(f"this worker does not stand on {target.bucket}: initialise it first")
            self._make_ready(target)

        try:
            self._begin_staging(target, job)
        except EngineUnavailable:
            return {"accepted": False}
        return {"accepted": True}

    def answer_environ(self, request: dict[str, Any]) -> dict[str, Any]:
        """What decides whether this process reaches {"bucket"}; of secrets only whether they are set."""
        url = str(request["bucket"])
        return {"environ": environment.seen(url, os.environ | self._settings), "pid": os.getpid()}

    def answer_begin(self, request: dict[str, Any]) -> dict[str, Any]:
        """Start what takes long: {"verb", "ticket", "request"}; `answer_result` tells its answer. Not accepted while
        something else runs; asked again with the same ticket, it is begun once."""
        job = _convert(request, Job)
        if job.verb != "audit":
            self._require_lease(request)

        def work() -> None:
            try:
                answer = self.answer_audit(job.request) if job.verb == "audit" else self.answer_blame(job.request)
            except Exception as error:
                answer = {"refused": {"kind": type(error).__name__, "message": str(error)}}
            self._answer = job.ticket, answer

        if self._asked != job.ticket:
            try:
                self._begin("auditing" if job.verb == "audit" else "looking for drift", work)
            except EngineUnavailable:
                return {"accepted": False}
            self._asked = job.ticket
        return {"accepted": True}

    def answer_result(self, request: dict[str, Any]) -> dict[str, Any]:
        """What the job of {"ticket"} answered, once it is done."""
        self._background.lend()
        ticket, (answered, answer) = request["ticket"], self._answer
        if answered == ticket:
            return {"done": True, **answer}
        if self._asked != ticket:
            raise EngineUnavailable("something else was asked of this worker meanwhile: ask again")
        return {"done": False}

    def answer_holdings(self, request: dict[str, Any]) -> dict[str, Any]:
        """Which parts of which tensors this worker holds, and the digest of each as of its last update; and the
        committed digests of frozen tensors of which it holds nothing."""
        attached = self._require_attached()
        return {
            "sizes": attached.live.sizes,
            "parts": attached.live.parts,
            "digests": as_hex(attached.digests),
            "frozen": whole_as_hex(attached.frozen),
        }

    def answer_stand(self, request: dict[str, Any]) -> dict[str, Any]:
        """Be told which version the workers' digests, taken together, are: {"position"}, None when no committed one."""
        self._require_lease(request)
        attached, told = self._require_attached(), request["position"]
        attached.position, attached.joined = msgspec.convert(told, Position | None), True
        return {}

    def answer_staged(self, request: dict[str, Any]) -> dict[str, Any]:
        """The digest of every part after what is staged, or as it is when nothing has to be done."""
        attached, staged = self._require_attached(), self._plan
        return {"digests": as_hex(staged[2].digests if staged else attached.digests)}

    def answer_blame(self, request: dict[str, Any]) -> dict[str, Any]:
        """Which of these `names` hold something else than this worker's updates left there."""
        attached = self._require_attached()
        drifted = attached.drifted(request["names"])
        if drifted:
            self._quarantine(attached)
        return {"drifted": drifted}

    def answer_revert(self, request: dict[str, Any]) -> dict[str, Any]:
        """Take the last update back, unless it was confirmed: another worker could not write its part."""
        self._require_lease(request)
        with self._background.alone():
            reverted = self._require_attached().take_back()
        self._synchronize()
        return {"reverted": reverted}

    def answer_placement(self, request: dict[str, Any]) -> dict[str, Any]:
        """Every box of every tensor of the attached run, the frozen tensors of which this worker holds nothing, and
        the modules whose weights are made anew at an update."""
        live = self._attached.live if self._attached else None
        boxes = live.placement.boxes if live else {}
        return {
            "placement": {name: msgspec.to_builtins(parts) for name, parts in boxes.items()},
            "frozen": list(self._attached.frozen) if self._attached else [],
            "remade": [step.prefix for step in live.rebuilt()] if live else [],
        }

    def answer_audit(self, request: dict[str, Any]) -> dict[str, Any]:
        """Recompute every digest from live memory. `promised` are those of the version this worker says it serves, or,
        when it serves none, of the newest; `drifted` names what its own updates did not leave so. `bucket` names
        another bucket to compare with; nothing is followed by that.

        Weights that are not the version served quarantine the worker: it stops claiming a version.
        """
        with self._background.alone():
            url = request.get("bucket")
            other = url is not None and not self._stands_on(str(url))
            attached = self._opened(str(url)) if other else self._require_attached()
            found = attached.audit() | {"position": msgspec.to_builtins(attached.position)}
            if attached.position is not None and found["drifted"]:
                self._quarantine(attached)
            return found

    def _require_lease(self, request: dict[str, Any]) -> None:
        self.lease.require(request.get("lease"), alone=self._workers == 1)

    def _may_change(self, token: str | None, doing: str) -> bool:
        """Whether the lease allows a call that can answer nothing. A refusal is kept apart from outcomes: the holder
        need not hear of it."""
        try:
            self.lease.require(token, alone=self._workers == 1)
        except EngineError as error:
            self._refusal = {"kind": type(error).__name__, "message": str(error), "doing": doing}
            return False
        return True

    def _begin(self, doing: str, job: Callable[[], None], *, bucket: str | None = None) -> None:
        if not self._background.begin(doing, job, bucket=bucket):
            with self._background.alone():  # says what it is busy with
                raise EngineUnavailable("the worker was busy: ask again")

    def _begin_staging(self, target: Target, make_ready: Callable[[], None]) -> None:
        def job() -> None:
            with self.recording("stage"):
                make_ready()

        self._begin(f"staging version {target.version} of {target.bucket}", job, bucket=target.bucket)

    def _attach(self, url: str, trusted: Iterable[str], base: str | None) -> None:
        if (wanted := trust(trusted)) and wanted != self._trust:
            self._trust, self._plan = wanted, None
            self.close()
        if base != self._base and (base is not None or not self._stands_on(url)):  # it was named for that bucket alone
            self._base, self._plan = base, None
            self.close()
        attached = self._attached
        if attached is None or not self._stands_on(url) or attached.subscriber.run.run != self._head_run(url):
            self._stand_on(url)

    def _is_ready(self, target: Target) -> bool:
        """Whether an update to a version waits for nothing: it is staged from where we stand, or we stand there."""
        attached, staged = self._attached, self._plan
        if attached is None or not self._stands_on(target.bucket):
            return False
        if attached.position is not None and attached.position.version == target.version:
            return True
        return bool(
            staged and staged[:2] == (attached, attached.position) and staged[2].after.version == target.version
        )

    def _require_alone(self, target: Target) -> None:
        if self._workers > 1:
            raise EngineUnsupported(f"version {target.version} is not staged, and {_NOBODY_COMPARED}")

    def _make_ready(self, target: Target) -> None:
        """Stage a version; of the only worker also attach to its bucket, if need be."""
        self._plan = None
        if not self._stands_on(target.bucket):
            self._stand_on(target.bucket)
        attached = self._require_attached()
        since = attached.position
        if since is None or since.version != target.version:
            plan = self._prepare(attached, target.version)
            self._background.go_on()
            self._plan = attached, since, plan

    def _write_ready(self, target: Target) -> None:
        attached, staged, self._plan = self._require_attached(), self._plan, None
        if attached.position is not None and attached.position.version == target.version:
            return
        if staged is None or (attached.union is None and target.root != staged[2].after.root):
            raise EngineUnsupported(f"this worker holds a part of the model, and {_NOBODY_COMPARED}")
        self._write(attached, staged[2])

    def _prepare(self, attached: Attached, version: int) -> Plan:
        """The plan that leads to a version, compared with its commit where that can be."""
        try:
            if self._quarantined:
                attached.digests = attached.live.digests()
            return attached.plan(version)
        except WrongBase:
            self._quarantine(attached)
            raise
        except (FormatError, ChainError):
            attached.subscriber.refresh()  # a record may have been damaged on its way
            raise
        finally:
            attached.subscriber.close()  # an anchor's files are as large as the model, and not needed again

    def _quarantine(self, attached: Attached) -> None:
        """Claim no version any more. The next update starts from an anchor and compares all of memory with it."""
        self._background.go_on()
        self._quarantined, self._plan = True, None
        attached.forget_version()

    def _write(self, attached: Attached, plan: Plan) -> None:
        """Apply a plan. When that fails the old weights are put back, and proved to be, or the worker quarantined."""
        started = time.perf_counter()
        try:
            staging.apply(plan.writes)
            self._synchronize()
            seconds = time.perf_counter() - started
            attached.require_written(plan)
        except BaseException:
            if attached.live.digests() != attached.digests:
                self._quarantine(attached)
            raise
        attached.wrote(plan)
        self._quarantined = False
        self._applied = {**_facts(plan), "write_ms": 1e3 * seconds}

    def _stands_on(self, url: str) -> bool:
        attached = self._attached
        return attached is not None and (
            url == attached.asked or self._open_bucket(url).url == attached.subscriber.bucket.url
        )

    def _open_bucket(self, url: str) -> Bucket:
        with environment.applied(url, self._settings):
            return open_bucket(url)

    def _head_run(self, url: str) -> str:
        return current_run(self._open_bucket(url), trust=self._trust)

    def _stand_on(self, url: str) -> None:
        opened = self._opened(url)
        self._background.go_on()
        self.close()
        self._attached = opened

    def _opened(self, url: str) -> Attached:
        """A bucket's run and this worker's weights in it. Their digests say where they stand: at a committed version
        or at none."""
        if self._loading is None:
            raise EngineUnsupported("the model was loaded before the deltawire plugin: restart vLLM with it installed")
        if self._copies > 1:
            raise EngineUnsupported(
                f"{self._copies} data-parallel copies serve this model, and one call reaches one of them: start each "
                "as a server of its own, with its own follower"
            )
        subscriber = Subscriber(self._open_bucket(url), base=self._base, trusted=self._trust)
        opened = attach(url, subscriber, self._model, self._loading, self._background.between_passes)
        if self._compiled and any(step.hidden for step in opened.live.rebuilt()):
            raise EngineUnsupported(
                "a compiled model keeps the packed weights it was traced with: start vLLM with --enforce-eager, or "
                "without DELTAWIRE_PREPACK=keep"
            )
        if self._workers == 1:
            opened.find_version()
        return opened

    def _require_attached(self) -> Attached:
        if self._attached is None:
            raise EngineUnsupported(
                "no bucket is followed here yet: start `deltawire follow` first, or name a --bucket"
            )
        return self._attached

    @contextmanager
    def recording(self, doing: str, *, clear: bool = True) -> Iterator[None]:
        """Keep what a block raises as the newest problem; a block that succeeds clears it, if asked to."""
        try:
            yield
        except Exception as error:
            if not self._background.is_abandoned():
                self._problem = {"kind": type(error).__name__, "message": str(error), "doing": doing}
        else:
            if clear and not self._background.is_abandoned():
                self._problem = None


def _convert(request: object, kind: type[S]) -> S:
    try:
        return msgspec.convert(request, kind)
    except msgspec.ValidationError as error:
        raise EngineError(f"{kind.__name__} is asked for by {', '.join(kind.__struct_fields__)}: {error}") from None


def _facts(plan: Plan) -> dict[str, Any]:
    return {
        "run": plan.after.run,
        "version": plan.after.version,
        "from_version": plan.since.version if plan.since else None,
        "changed": plan.changed,
        "wire_bytes": plan.wire_bytes,
        "created": plan.created,
        "fetch_s": plan.fetch_seconds,
        "stage_s": plan.stage_seconds,
    }
