"""One worker's copy of the weights: the bucket it stands on, the version it is, and the update it has prepared.

Nothing that a server asks of it raises. With several workers an exception in one leaves every later answer off by one
behind HTTP 200, so failures are kept here and read back by `answer_status`. A failure leaves weights and version.

Weights and position change on the worker's own thread alone; staging, on a thread of ours, only reads them.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from deltawire.buckets import open_bucket
from deltawire.digest import root as root_of
from deltawire.errors import (
    ChainError,
    EngineError,
    EngineUnavailable,
    EngineUnsupported,
    Forked,
    FormatError,
    Gap,
    Quarantined,
    WrongBase,
)
from deltawire.log import current_run
from deltawire.manifests import Position
from deltawire.signing import Trust, trust
from deltawire.subscriber import Subscriber
from deltawire.vllm import staging
from deltawire.vllm.live import LiveWeights
from deltawire.vllm.staging import Plan


class Target(msgspec.Struct, frozen=True):
    """What an update asks for."""

    bucket: str
    version: int


@dataclass(eq=False)
class _Attached:
    """A bucket's run, this worker's weights as that run names them, their digests, and which version they are."""

    asked: str
    subscriber: Subscriber
    live: LiveWeights
    digests: dict[str, int]
    position: Position | None


class Replica:
    """The weights of `model`, followed through one bucket at a time.

    `transformed` names tensors that were changed or made after loading; None means that nobody watched, and no bucket
    is attached. `workers` hold the model together. `synchronize` waits until what was written is on the device.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        transformed: Mapping[str, str] | None,
        workers: int = 1,
        synchronize: Callable[[], None] = lambda: None,
    ) -> None:
        self._model, self._transformed = model, transformed
        self._workers, self._synchronize = workers, synchronize
        self._attached: _Attached | None = None
        self._trust = Trust()
        self._plan: tuple[_Attached, Position | None, Plan] | None = None
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
        with self._recording("update"), self._alone():
            target = _convert(request)
            if not self._stands_on(target.bucket):
                self._stand_on(target.bucket)
            attached, staged, self._plan = self._require_attached(), self._plan, None
            if self._quarantined:
                raise Quarantined("this worker's weights are not the version it claimed: restart vLLM")
            if attached.position is not None and attached.position.version == target.version:
                return
            if staged and staged[:2] == (attached, attached.position) and staged[2].after.version == target.version:
                self._write(attached, staged[2])
            else:
                self._write(attached, self._prepare(attached, target.version))

    def close(self) -> None:
        """Forget the bucket and its downloads; the weights stay as they are."""
        attached, self._attached, self._plan = self._attached, None, None
        if attached is not None:
            attached.subscriber.close()

    def answer_status(self, request: dict[str, Any]) -> dict[str, Any]:
        """Where this worker stands, what is staged, and the newest outcome."""
        attached, staged = self._attached, self._plan
        position = attached.position if attached and not self._quarantined else None
        return {
            "attached": attached.subscriber.bucket.url if attached else None,
            "run": attached.subscriber.run.run if attached else None,
            "position": _as_dict(position),
            "staging": self._staging,
            "staged": _facts(staged[2]) if staged else None,
            "applied": self._applied,
            "quarantined": self._quarantined,
            "error": self._problem,
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

    def answer_placement(self, request: dict[str, Any]) -> dict[str, Any]:
        """Every box of every tensor of the attached run."""
        boxes = self._attached.live.placement.boxes if self._attached else {}
        return {"placement": {name: [_box(box) for box in parts] for name, parts in boxes.items()}}

    def answer_audit(self, request: dict[str, Any]) -> dict[str, Any]:
        """Recompute every digest from live memory and compare with the version this worker says it serves, or, when it
        serves none, with the newest one. `bucket` names another bucket to compare with; nothing is followed by that.

        Weights that are not the version served quarantine the worker: it stops claiming a version.
        """
        with self._alone():
            url = request.get("bucket")
            other = url is not None and not self._stands_on(str(url))
            attached = self._opened(str(url)) if other else self._require_attached()
            digests = attached.live.digests()
            expected = attached.digests
            if attached.position is None:
                expected = attached.subscriber.digests_at(attached.subscriber.latest().version)
            wrong = [name for name, value in expected.items() if digests[name] != value]
            self._quarantined = self._quarantined or bool(wrong and attached.position is not None)
            return {
                "position": _as_dict(attached.position),
                "digests": {name: f"{value:016x}" for name, value in digests.items()},
                "mismatched": wrong,
            }

    def _stage(self, target: Target) -> None:
        try:
            with self._recording("stage"):
                if not self._stands_on(target.bucket):
                    raise EngineUnavailable(f"this worker does not stand on {target.bucket}: initialise it first")
                attached = self._require_attached()
                since = attached.position
                if since is None or since.version != target.version:
                    self._plan = attached, since, self._prepare(attached, target.version)
        finally:
            self._staging = False
            self._reading.release()

    def _prepare(self, attached: _Attached, version: int) -> Plan:
        """The plan that leads to a version, newer or older, from where we stand; from an anchor when we stand at no
        version, or at one that the chain no longer has."""
        try:
            try:
                since = attached.position
                return staging.stage(attached.live, attached.digests, attached.subscriber, since, version)
            except (Gap, Forked):
                if since is None:
                    raise
                return staging.stage(attached.live, attached.digests, attached.subscriber, None, version)
        except WrongBase:
            self._quarantined = True
            raise
        except (FormatError, ChainError):
            attached.subscriber.refresh()  # a record may have been damaged on its way
            raise
        finally:
            attached.subscriber.close()  # an anchor's files are as large as the model, and not needed again

    def _write(self, attached: _Attached, plan: Plan) -> None:
        """Apply a plan. When that fails the old weights are put back, and proved to be, or the worker quarantined."""
        started = time.perf_counter()
        try:
            staging.apply(plan.writes)
            self._synchronize()
            seconds = time.perf_counter() - started
            if plan.since is None:
                _check_whole(attached.live, plan)
        except BaseException:
            self._quarantined = True
            self._quarantined = attached.live.digests() != attached.digests
            raise
        attached.digests, attached.position = dict(plan.digests), plan.after
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

    def _opened(self, url: str) -> _Attached:
        """A bucket's run and this worker's weights in it. Their digests say where they stand: at a committed version
        or at none."""
        if self._transformed is None:
            raise EngineUnsupported("the model was loaded before the deltawire plugin: restart vLLM with it installed")
        if self._workers > 1:
            raise EngineUnsupported(
                f"{self._workers} workers hold this model, and that is not proven yet: serve it without tensor, "
                "pipeline or data parallelism"
            )
        subscriber = Subscriber(open_bucket(url), trusted=self._trust)
        run = subscriber.run
        live = LiveWeights(self._model, run.table, transformed=self._transformed)
        digests = live.digests()
        return _Attached(url, subscriber, live, digests, subscriber.position_of(root_of(run.table, digests)))

    def _require_attached(self) -> _Attached:
        if self._attached is None:
            raise EngineUnsupported("nothing is followed yet: name a bucket")
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
    def _recording(self, doing: str) -> Iterator[None]:
        """Keep what a block raises as the newest problem; a block that succeeds clears it."""
        try:
            yield
        except Exception as error:
            self._problem = {"kind": type(error).__name__, "message": str(error), "doing": doing}
        else:
            self._problem = None


def _check_whole(live: LiveWeights, plan: Plan) -> None:
    """After an anchor every weight is read back: no earlier digest vouches for the rest of the memory."""
    digests = live.digests()
    if wrong := [name for name, value in plan.digests.items() if digests[name] != value]:
        staging.undo(plan.writes)
        raise WrongBase(f"{plan.after}: {len(wrong)} tensors read back wrong ({', '.join(wrong[:4])}); put back")


def _head_run(url: str) -> str:
    return current_run(open_bucket(url))


def _convert(request: object) -> Target:
    try:
        return msgspec.convert(request, Target)
    except msgspec.ValidationError as error:
        raise EngineError(f'an update is named by {{"bucket": URL, "version": number}}: {error}') from None


def _as_dict(position: Position | None) -> dict[str, Any] | None:
    return None if position is None else {"run": position.run, "version": position.version, "root": position.root}


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


def _box(box: Any) -> dict[str, Any]:
    return {name: getattr(box, name) for name in box.__dataclass_fields__}
