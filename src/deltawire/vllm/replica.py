"""What one worker does with its part of the weights when asked: attach, stage, write, confirm, take back, audit.

A worker that holds the whole model compares with commits by itself. Of several, each holds parts, and only all together
can be compared: a follower adds up what they report, tells them where they stand, and vouches for what they write.

Nothing that a server asks of it raises. With several workers an exception in one leaves every later answer off by one
behind HTTP 200, so failures are kept here and read back by `answer_status`. A failure leaves weights and version.

Weights and position change on the worker's own thread alone; staging, on a thread of ours, only reads them.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import torch

from deltawire.buckets import open_bucket
from deltawire.errors import ChainError, EngineError, EngineUnavailable, EngineUnsupported, FormatError, WrongBase
from deltawire.log import current_run
from deltawire.manifests import Position
from deltawire.signing import Trust, trust
from deltawire.vllm import cores, staging
from deltawire.vllm.attached import Attached, as_hex, attach, whole_as_hex
from deltawire.vllm.loading import AfterLoading
from deltawire.vllm.staging import Plan

_NOBODY_COMPARED = "only a follower can compare what all workers hold together with the commit: run `deltawire follow`"


class Target(msgspec.Struct, frozen=True):
    """What an update asks for; `root` is what a follower found all workers together to lead to."""

    bucket: str
    version: int
    root: str | None = None


class Replica:
    """The weights of `model`, followed through one bucket at a time.

    `loading` is what vLLM changed after loading; None means that nobody watched, and no bucket is attached. `workers`
    hold the model together. `copies` of it serve (data parallelism). `compiled` models keep what they were traced with.
    `synchronize` waits until what was written is on the device.
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
    ) -> None:
        self._model, self._loading = model, loading
        self._workers, self._copies, self._compiled = workers, copies, compiled
        self._synchronize = synchronize
        self._attached: Attached | None = None
        self._trust = Trust()
        self._plan: tuple[Attached, Position | None, Plan] | None = None
        self._problem: dict[str, str] | None = None
        self._applied: dict[str, Any] | None = None
        self._quarantined = False
        self._staging = False
        self._reading = threading.Lock()
        """held by whoever uses the subscriber"""

    def attach(self, url: str, trusted: Iterable[str] = ()) -> None:
        """Stand on the run that a bucket's HEAD names: probe placement, digest live weights, find the version they
        are. With `trusted` public keys every record must be signed by one, from here on."""
        with self._recording("attach"), self._alone():
            if (wanted := trust(trusted)) and wanted != self._trust:
                self._trust, self._plan = wanted, None
                self.close()
            attached = self._attached
            if attached is None or not self._stands_on(url) or attached.subscriber.run.run != _head_run(url):
                self._stand_on(url)

    def commit(self, request: object) -> None:
        """Write the plan staged for {"bucket", "version"}; without one (a plain POST, no follower) stage it first."""
        if self._attached is not None:  # an update that was not confirmed: from here on only this one is taken back
            self._attached.confirm()
        with self._recording("update"), self._alone():
            target = _convert(request)
            if not self._stands_on(target.bucket):
                self._stand_on(target.bucket)
            attached, staged, self._plan = self._require_attached(), self._plan, None
            if attached.position is not None and attached.position.version == target.version:
                return
            if staged and staged[:2] == (attached, attached.position) and staged[2].after.version == target.version:
                plan = staged[2]
            elif attached.union is None:
                raise EngineUnsupported(f"version {target.version} is not staged, and {_NOBODY_COMPARED}")
            else:
                plan = self._prepare(attached, target.version)
            if attached.union is None and target.root != plan.after.root:
                raise EngineUnsupported(f"this worker holds a part of the model, and {_NOBODY_COMPARED}")
            self._write(attached, plan)

    def confirm(self) -> None:
        """Keep the last update: what it replaced is forgotten. Leaves the newest outcome to be read."""
        with self._recording("finish", clear=False):
            self._keep()

    def _keep(self) -> None:
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
        """Where this worker stands, what is staged, and the newest outcome."""
        attached, staged = self._attached, self._plan
        return {
            "attached": attached.subscriber.bucket.url if attached else None,
            "run": attached.subscriber.run.run if attached else None,
            "position": msgspec.to_builtins(self.position),
            "joined": bool(attached and attached.joined),
            "staging": self._staging,
            "staged": _facts(staged[2]) if staged else None,
            "applied": self._applied,
            "quarantined": self._quarantined,
            "error": self._problem,
            "fetching": attached.subscriber.fetching if attached else None,
        }

    def answer_stage(self, request: dict[str, Any]) -> dict[str, Any]:
        """Start staging {"bucket", "version"} on a thread of our own; ask the status for its outcome. Not accepted
        while another is being staged."""
        if not self._reading.acquire(blocking=False):
            return {"accepted": False}
        self._staging, self._plan = True, None
        try:
            target = _convert(request)
            threading.Thread(target=self._stage, args=(target,), name="deltawire-stage", daemon=True).start()
        except BaseException:
            self._staging = False
            self._reading.release()
            raise
        return {"accepted": True}

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
        with self._alone():
            url = request.get("bucket")
            other = url is not None and not self._stands_on(str(url))
            attached = self._opened(str(url)) if other else self._require_attached()
            found = attached.audit() | {"position": msgspec.to_builtins(attached.position)}
            if attached.position is not None and found["drifted"]:
                self._quarantine(attached)
            return found

    def _stage(self, target: Target) -> None:
        try:
            with self._recording("stage"):
                cores.move(cores.allowed())
                if not self._stands_on(target.bucket):
                    raise EngineUnavailable(f"this worker does not stand on {target.bucket}: initialise it first")
                attached = self._require_attached()
                since = attached.position
                if since is None or since.version != target.version:
                    self._plan = attached, since, self._prepare(attached, target.version)
        finally:
            self._staging = False
            self._reading.release()

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
            url == attached.asked or open_bucket(url).url == attached.subscriber.bucket.url
        )

    def _stand_on(self, url: str) -> None:
        opened = self._opened(url)
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
        opened = attach(url, self._trust, self._model, self._loading)
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
    def _alone(self) -> Iterator[None]:
        """Keep staging out; never wait for it, because the server would not generate meanwhile."""
        if not self._reading.acquire(blocking=False):
            raise EngineUnavailable("a version is being staged for a follower: ask again when the status says it is")
        try:
            yield
        finally:
            self._reading.release()

    @contextmanager
    def _recording(self, doing: str, *, clear: bool = True) -> Iterator[None]:
        """Keep what a block raises as the newest problem; a block that succeeds clears it, if asked to."""
        try:
            yield
        except Exception as error:
            self._problem = {"kind": type(error).__name__, "message": str(error), "doing": doing}
        else:
            if clear:
                self._problem = None


def _head_run(url: str) -> str:
    return current_run(open_bucket(url))


def _convert(request: object) -> Target:
    try:
        return msgspec.convert(request, Target)
    except msgspec.ValidationError as error:
        raise EngineError(f'an update is named by {{"bucket": URL, "version": number}}: {error}') from None


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
