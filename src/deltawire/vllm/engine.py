"""The weight transfer engine that vLLM creates in each worker. It records outcomes and never raises.

With several workers an exception in one leaves every later answer off by one behind HTTP 200, so failures are kept here
and read back by `deltawire_status`, which echoes the asker's nonce. A failure leaves the old weights and version.
"""

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from deltawire import kernels
from deltawire.buckets import open_bucket
from deltawire.codecs import gap
from deltawire.digest import root as root_of
from deltawire.errors import EngineUnsupported, WrongBase
from deltawire.manifests import Position
from deltawire.subscriber import Subscriber
from deltawire.vllm import staging
from deltawire.vllm.hooks import TRANSFORMED
from deltawire.vllm.live import LiveWeights
from deltawire.vllm.staging import Plan


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Body of /init_weight_transfer_engine: the bucket to stand on, optional."""

    bucket: str | None = None


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Body of /update_weights: which version of which bucket."""

    bucket: str
    version: int


@dataclass
class _Attached:
    """A bucket's run, this worker's weights as that run names them, and where they stand."""

    subscriber: Subscriber
    live: LiveWeights
    digests: dict[str, int]
    position: Position | None


@dataclass
class _State:
    """What `deltawire_status` reports. `problem` is the newest failure, cleared by the next success."""

    attached: _Attached | None = None
    plan: Plan | None = None
    staging: tuple[str, int] | None = None
    problem: dict[str, str] | None = None
    applied: dict[str, Any] | None = None
    quarantined: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock)


class DeltaWireEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Patches this worker's live weights in place, in O(changed)."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._state = _State()
        kernels.warm_up()  # nothing compiles inside a pause
        gap.warm_up()

    def parse_init_info(self, init_dict: dict[str, Any]) -> InitInfo:
        """The bucket, if one is named; anything else is ignored, because parsing must not raise here."""
        return InitInfo(init_dict.get("bucket") if isinstance(init_dict, dict) else None)

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Attach to a bucket: probe placement, digest live weights, find the version they are."""
        if init_info.bucket is not None:
            with self._recording("init"):
                self._attach(init_info.bucket)

    def start_weight_update(self) -> None:
        """Nothing to prepare: staging has its own call, and needs no session."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Commit the staged plan for {"bucket", "version"}; without one (a plain POST, no follower) stage it first."""
        with self._recording("update"), self._state.lock:
            update = self.parse_update_info(update_info)
            plan, self._state.plan = self._state.plan, None
            attached = self._attach(update.bucket)
            if plan is None or (plan.after.version, plan.before) != (update.version, attached.position):
                plan = self._plan(attached, update.version)
            self._commit(attached, plan)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """vLLM's inner half of update_weights, which this engine overrides whole."""
        self.update_weights({"bucket": update_info.bucket, "version": update_info.version})

    def finish_weight_update(self) -> None:
        """Nothing to finish: an update is whole when update_weights returns."""

    def shutdown(self) -> None:
        """Forget the bucket and its downloads; the weights stay as they are."""
        with self._state.lock:
            if self._state.attached is not None:
                self._state.attached.subscriber.close()
                self._state.attached = None

    def answer_status(self, request: dict[str, Any]) -> dict[str, Any]:
        """Where this worker stands, what is staged, and the newest outcome."""
        state, attached = self._state, self._state.attached
        plan, position = state.plan, attached.position if attached else None
        return {
            "attached": attached.subscriber.bucket.url if attached else None,
            "position": _as_dict(position) if not state.quarantined else None,
            "staging": state.staging is not None,
            "staged": _facts(plan) if plan else None,
            "applied": state.applied,
            "quarantined": state.quarantined,
            "error": state.problem,
        }

    def answer_stage(self, request: dict[str, Any]) -> dict[str, Any]:
        """Start staging {"bucket", "version"} on a thread of our own; ask the status for its outcome."""
        bucket, version = str(request["bucket"]), int(request["version"])
        with self._state.lock:
            if self._state.staging is not None:
                return {"accepted": False}
            self._state.staging, self._state.plan, self._state.problem = (bucket, version), None, None
        with self._recording("attach"):
            attached = self._attach(bucket)
            if attached.position is not None and attached.position.version == version:
                self._state.staging = None
                return {"accepted": True}
            threading.Thread(target=self._stage, args=(attached, version), name="deltawire-stage", daemon=True).start()
            return {"accepted": True}
        self._state.staging = None
        return {"accepted": False}

    def answer_placement(self, request: dict[str, Any]) -> dict[str, Any]:
        """Every box of every tensor of the attached run."""
        attached = self._state.attached
        boxes = attached.live.placement.boxes if attached else {}
        return {"placement": {name: [_box(box) for box in parts] for name, parts in boxes.items()}}

    def answer_audit(self, request: dict[str, Any]) -> dict[str, Any]:
        """Recompute every digest from live memory and compare with the version this worker says it serves.

        A mismatch quarantines the worker: it stops claiming a version.
        """
        with self._state.lock:
            attached = self._attach(request["bucket"]) if request.get("bucket") else self._state.attached
            if attached is None:
                raise EngineUnsupported("nothing is followed yet: name a bucket to audit against")
            digests = attached.live.digests()
            expected = attached.digests if attached.position is not None else {}
            wrong = [name for name, value in expected.items() if digests[name] != value]
            self._state.quarantined = self._state.quarantined or bool(wrong)
            return {
                "position": _as_dict(attached.position),
                "digests": {name: f"{value:016x}" for name, value in digests.items()},
                "mismatched": wrong,
            }

    def _stage(self, attached: _Attached, version: int) -> None:
        with self._recording("stage"):
            self._state.plan = self._plan(attached, version)
        self._state.staging = None

    def _plan(self, attached: _Attached, version: int) -> Plan:
        return staging.stage(attached.live, attached.digests, attached.subscriber, attached.position, version)

    def _commit(self, attached: _Attached, plan: Plan) -> None:
        if self._state.quarantined:
            raise WrongBase("this worker is quarantined: its weights are not the version it claimed; restart vLLM")
        started = time.perf_counter()
        staging.apply(plan.writes)
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        seconds = time.perf_counter() - started
        if plan.before is None:
            self._check_whole(attached, plan)
        attached.digests, attached.position = dict(plan.digests), plan.after
        self._state.applied = {**_facts(plan), "write_ms": 1e3 * seconds}

    def _check_whole(self, attached: _Attached, plan: Plan) -> None:
        """After an anchor every weight is read back: no earlier digest vouches for the rest of the memory."""
        digests = attached.live.digests()
        if wrong := [name for name, value in plan.digests.items() if digests[name] != value]:
            staging.undo(plan.writes)
            raise WrongBase(f"{plan.after}: {len(wrong)} tensors read back wrong ({', '.join(wrong[:4])}); put back")

    def _attach(self, url: str) -> _Attached:
        """Stand on a bucket's run. The live digests say where: a committed version's, or no version at all."""
        with self._state.lock:
            if self._state.attached is not None and self._state.attached.subscriber.bucket.url == url:
                return self._state.attached
            self._require_layout()
            subscriber = Subscriber(open_bucket(url))
            run = subscriber.run
            transformed = getattr(self.model, TRANSFORMED, None)
            if transformed is None:
                raise EngineUnsupported(
                    "the model was loaded before the deltawire plugin: restart vLLM with it installed"
                )
            live = LiveWeights(self.model, run.table, transformed=transformed)
            digests = live.digests()
            position = subscriber.position_of(root_of(run.table, digests))
            self.shutdown()
            self._state.attached = _Attached(subscriber, live, digests, position)
            return self._state.attached

    def _require_layout(self) -> None:
        parallel = self.parallel_config
        if parallel.world_size > 1 or parallel.data_parallel_size > 1:
            raise EngineUnsupported(
                f"parallel sizes above 1 are not proven yet (world size {parallel.world_size}, data parallel "
                f"{parallel.data_parallel_size}); serve with one worker per follower"
            )

    def _recording(self, doing: str) -> "_Recorder":
        return _Recorder(self._state, doing)


class _Recorder:
    """Turns what a block raises into the state's `problem`."""

    def __init__(self, state: _State, doing: str) -> None:
        self._state, self._doing = state, doing

    def __enter__(self) -> None:
        self._state.problem = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if error is None:
            return False
        self._state.problem = {"kind": type(error).__name__, "message": str(error), "doing": self._doing}
        return isinstance(error, Exception)


def _as_dict(position: Position | None) -> dict[str, Any] | None:
    return None if position is None else {"run": position.run, "version": position.version, "root": position.root}


def _facts(plan: Plan) -> dict[str, Any]:
    return {
        "run": plan.after.run,
        "version": plan.after.version,
        "from_version": plan.before.version if plan.before else None,
        "changed": plan.changed,
        "wire_bytes": plan.wire_bytes,
        "created": plan.created,
        "fetch_s": plan.fetch_seconds,
        "stage_s": plan.stage_seconds,
    }


def _box(box: Any) -> dict[str, Any]:
    return {
        "shape": box.shape,
        "source_offset": box.source_offset,
        "source_strides": box.source_strides,
        "parameter": box.parameter,
        "target_offset": box.target_offset,
        "target_strides": box.target_strides,
    }
