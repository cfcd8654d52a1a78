"""One worker's model, attached to one bucket at a time: attach, stage, write, take back, audit.

A failure leaves weights and version as they were, or quarantines the model. It then claims no version until an update
from an anchor has compared all of memory. Who may ask for what, and what runs in the background, is `worker`'s to
decide.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from deltawire.buckets import Bucket, environment, open_bucket
from deltawire.errors import ChainError, EngineUnsupported, FormatError, WrongBase
from deltawire.live import writes
from deltawire.live.accelerator import Accelerators
from deltawire.live.attached import Attached, attach
from deltawire.live.background import Background
from deltawire.live.live_weights import tensors_of
from deltawire.live.messages import Applied, Attach, Audited, Update
from deltawire.live.staging import Plan
from deltawire.live.transforms import AfterLoading
from deltawire.read.host_cache import host_cache
from deltawire.read.subscriber import Subscriber
from deltawire.runlog.log import current_run
from deltawire.runlog.records import Position
from deltawire.runlog.signing import Trust, trust

NOBODY_COMPARED = "only a follower can compare what all workers hold together with the commit: run `deltawire follow`"
Moment = Literal["attach", "stage", "write", "confirm"]
"""what a worker is about to do"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """How a server holds a model.

    `loading` is what it changed after loading; None means that nobody watched, and no bucket can be attached.
    `workers` hold the model together. `copies` of it serve (data parallelism). `compiled` models keep what they were
    traced with.
    """

    loading: AfterLoading | None
    workers: int = 1
    copies: int = 1
    compiled: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class StagedUpdate:
    """A plan, the attachment that it was made for, and the version that its weights were at."""

    attached: Attached
    since: Position | None
    plan: Plan

    def leads(self, attached: Attached, version: int) -> bool:
        """Whether it leads from where these weights are to a version."""
        from_here = self.attached is attached and self.since == attached.position
        return from_here and self.plan.after.version == version


class LiveModel:
    """The weights of `model`. Jobs in `background` call the same methods; one that was abandoned changes nothing.
    `before` is called when a moment is about to begin."""

    def __init__(
        self, model: torch.nn.Module, serving: Serving, background: Background, before: Callable[[Moment], None]
    ) -> None:
        self._model, self._serving, self._background, self._before = model, serving, background, before
        self.accelerators = Accelerators()
        self.accelerators.take_for(tensors_of(model).values())
        self.settings: dict[str, str] = {}
        """of the environment, that a follower gave: where the bucket's store is"""
        self.trust = Trust()
        self.base: str | None = None
        self.attached: Attached | None = None
        self.staged: StagedUpdate | None = None
        self.applied: Applied | None = None
        self.quarantined = False

    @property
    def position(self) -> Position | None:
        """The version these weights are, None while that is no committed one or in doubt."""
        return self.attached.position if self.attached and not self.quarantined else None

    def close(self) -> None:
        """Forget the bucket and its downloads; the weights stay as they are."""
        attached, self.attached, self.staged = self.attached, None, None
        if attached is not None:
            attached.subscriber.close()

    def attach(self, asked: Attach) -> None:
        """Attach to the run that a bucket's HEAD names, unless it is attached already. A different key, base or setting
        attaches again.

        Raises BucketError, FormatError, ChainError; EngineUnsupported for a model that cannot be patched.
        """
        if self.settings != asked.settings:
            self.settings = asked.settings
            self.close()
        if (wanted := trust(asked.trusted)) and wanted != self.trust:
            self.trust = wanted
            self.close()
        known = asked.base is None and self.is_attached_to(asked.bucket)  # a base was named for that bucket alone
        if asked.base != self.base and not known:
            self.base = asked.base
            self.close()
        attached = self.attached
        if attached is None or not self.is_attached_to(asked.bucket) or self._is_superseded(attached, asked.bucket):
            self._attach_to(asked.bucket)

    def is_attached_to(self, url: str) -> bool:
        """Whether an address is that of the bucket attached."""
        attached = self.attached
        return attached is not None and (
            url == attached.asked or self._open_bucket(url).url == attached.subscriber.bucket.url
        )

    def is_ready(self, target: Update) -> bool:
        """Whether an update to a version waits for nothing: it is staged from where the weights are, or they are it."""
        attached, staged = self.attached, self.staged
        if attached is None or not self.is_attached_to(target.bucket):
            return False
        if attached.position is not None and attached.position.version == target.version:
            return True
        return staged is not None and staged.leads(attached, target.version)

    def make_ready(self, bucket: str, version: int) -> None:
        """Stage a version; attach to its bucket first, if need be. Raises what `Attached.plan` does."""
        self.staged = None
        if not self.is_attached_to(bucket):
            self._attach_to(bucket)
        attached = self.require_attached()
        since = attached.position
        if since is None or since.version != version:
            plan = self._prepare(attached, version)
            self._background.go_on()
            self.staged = StagedUpdate(attached, since, plan)

    def write_ready(self, target: Update) -> None:
        """Write what is staged. Raises EngineUnsupported where other workers hold the rest and nobody compared."""
        attached, staged, self.staged = self.require_attached(), self.staged, None
        if attached.position is not None and attached.position.version == target.version:
            return
        if staged is None or (attached.coverage is None and target.root != staged.plan.after.root):
            raise EngineUnsupported(f"this worker holds a part of the model, and {NOBODY_COMPARED}")
        self._write(attached, staged.plan)

    def confirm(self) -> None:
        """An update that was neither confirmed nor taken back stays: only the next one can be taken back."""
        if self.attached is not None:
            self.attached.confirm()

    def take_back(self) -> bool:
        """Put back what the last update replaced; False when it was confirmed, or there was none."""
        with self._background.alone():
            attached = self.require_attached()
            try:
                reverted = attached.take_back()
                self.accelerators.wait()
            except BaseException:
                self._quarantine_unless_sound(attached)
                raise
        return reverted

    def drifted(self, names: Iterable[str]) -> list[str]:
        """Which of these tensors hold something else than the last update left there; any quarantine the model."""
        attached = self.require_attached()
        if drifted := attached.drifted(names):
            self._quarantine(attached)
        return drifted

    def audit(self, bucket: str | None) -> Audited:
        """See `Attached.audit`; `bucket` compares with another bucket, and attaches to nothing. Weights that are not
        the version served quarantine the model."""
        with self._background.alone():
            other = bucket is not None and not self.is_attached_to(bucket)
            attached = self._opened(str(bucket)) if other else self.require_attached()
            found = attached.audit()
            if attached.position is not None and found.drifted:
                self._quarantine(attached)
            return found

    def require_attached(self) -> Attached:
        """What is attached. Raises EngineUnsupported when nothing is."""
        if self.attached is None:
            raise EngineUnsupported(
                "no bucket is followed here yet: start `deltawire follow` first, or name a --bucket"
            )
        return self.attached

    def _prepare(self, attached: Attached, version: int) -> Plan:
        """The plan that leads to a version, compared with its commit where that can be."""
        self._before("stage")
        try:
            if self.quarantined:
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
        self.quarantined, self.staged = True, None
        attached.forget_version()

    def _quarantine_unless_sound(self, attached: Attached) -> None:
        """After a failure: memory that cannot even be read is in doubt, too."""
        try:
            self.accelerators.wait()
            sound = attached.is_sound()
        except BaseException:
            sound = False
        if not sound:
            self._quarantine(attached)

    def _write(self, attached: Attached, plan: Plan) -> None:
        """Apply a plan. When that fails the old weights are put back, and proved to be, or the model quarantined."""
        self._before("write")
        started = time.perf_counter()
        try:
            writes.apply(plan.writes)
            self.accelerators.wait()
            seconds = time.perf_counter() - started
            attached.require_written(plan)
        except BaseException:
            self._quarantine_unless_sound(attached)
            raise
        attached.wrote(plan)
        self.quarantined = False
        self.applied = _applied(plan, seconds)

    def _open_bucket(self, url: str) -> Bucket:
        with environment.applied(url, self.settings):
            return open_bucket(url)

    def _is_superseded(self, attached: Attached, url: str) -> bool:
        """Whether the bucket's HEAD names another run than the one attached."""
        return attached.subscriber.run.run != current_run(self._open_bucket(url), trust=self.trust)

    def _attach_to(self, url: str) -> None:
        opened = self._opened(url)
        self._background.go_on()
        self.close()
        self.attached = opened

    def _opened(self, url: str) -> Attached:
        """A bucket's run and this worker's weights in it. Their digests say at which committed version they are, or at
        none."""
        self._before("attach")
        loading = self._require_provable()
        subscriber = Subscriber(self._open_bucket(url), base=self.base, trusted=self.trust, cache=host_cache())
        between = self._background.between_passes
        opened = attach(url, subscriber, self._model, loading, between_passes=between, accelerators=self.accelerators)
        if self._serving.compiled and any(transform.hidden for transform in opened.live.remade()):
            raise EngineUnsupported(
                "a compiled model keeps the packed weights it was traced with: start the server with --enforce-eager, "
                "or without DELTAWIRE_PREPACK=keep"
            )
        if self._serving.workers == 1:
            opened.find_version()
        return opened

    def _require_provable(self) -> AfterLoading:
        serving = self._serving
        if serving.loading is None:
            raise EngineUnsupported(
                "the model was loaded before the deltawire plugin: restart the server with it installed"
            )
        if serving.copies > 1:
            raise EngineUnsupported(
                f"{serving.copies} data-parallel copies serve this model, and one call reaches one of them: start each "
                "as a server of its own, with its own follower"
            )
        return serving.loading


def _applied(plan: Plan, seconds: float) -> Applied:
    return Applied(
        run=plan.after.run,
        version=plan.after.version,
        from_version=plan.since.version if plan.since else None,
        changed=plan.changed,
        wire_bytes=plan.wire_bytes,
        created=plan.created,
        fetch_s=plan.fetch_seconds,
        stage_s=plan.stage_seconds,
        write_ms=1e3 * seconds,
    )
