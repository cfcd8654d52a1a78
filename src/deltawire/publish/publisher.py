"""The trainer's side: capture what changed, keep it until it is durable, never make the trainer wait for the network.

    committed + frozen + waiting + uncovered == baseline        always, so a failure forgets nothing

`publish` compares with the baseline, moves it, and queues the change. The uploader's thread takes all that waits as one
folded version and freezes its bytes. It appends them to the run log, again and again until the version is durable.
"""

import atexit
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from deltawire.buckets.base import Bucket
from deltawire.buckets.temporary import TemporaryFolder
from deltawire.buckets.wrappers import Typed
from deltawire.errors import DeltaWireError, Unavailable, WrongBase
from deltawire.publish import given, resuming
from deltawire.publish.beats import TrainerBeats
from deltawire.publish.capturer import Capture, CaptureOptions
from deltawire.publish.choosing import Chooser
from deltawire.publish.devices import Asked, Cuda, Devices
from deltawire.publish.given import Pairs, Prepare
from deltawire.publish.receivers import Receivers
from deltawire.publish.reports import PublishReport, UploadReport
from deltawire.publish.requirements import LISTED, require_options
from deltawire.publish.roles import Keys, open_roles
from deltawire.publish.scratch import ScratchFiles
from deltawire.publish.sharded.ranks import is_first
from deltawire.publish.uploader import Queued, Uploader
from deltawire.runlog.records import Position
from deltawire.weights.bits import Bits
from deltawire.weights.digest import root as root_of
from deltawire.weights.interrupts import as_raised

GOODBYE = 30.0
"""seconds that rank 0, when it closes, waits for the other ranks to hear of the last commit"""
AT_EXIT = 30.0
"""seconds that a process which ends without closing its publisher waits for what is on its way"""
AFTER_ERROR = 10.0
"""seconds that it waits, and leaving a `with`, when an error ends it"""


class Publisher:
    """Publishes each new policy to a bucket as a delta.

    `base`: the checkpoint both sides start from, a folder or a Hub repository; version 0 then is a reference to it.
    Readers of a run that starts from a folder name a folder of their own, and so does a trainer that continues it.
    Without it version 0 is an anchor, a full checkpoint in the bucket, with the config and tokenizer files of `assets`.

    `dtype` is what fp32 and fp64 tensors are cast to, as the server holds them ("BF16"); with "F16" bf16 ones are cast
    too. Where a server holds some in fp32, it is a mapping: {"*.A_log": "F32", "*": "BF16"}. Its keys are patterns
    (fnmatch) over the checkpoint's names, and the first that fits rules. "*" is for all other names, "BF16" unless
    given. What the model keeps in fp32 ships as F32 where `checkpoint_tensors` gives it. Given as plain pairs beside
    16-bit tensors, it is rounded with a warning. `Bits` are shipped as they are, unless a pattern other than "*" fits.
    With a base, its dtypes rule; a pattern may still ask for values rounded to fewer bits.

    `prepare` are functions over the (name, tensor) pairs of a publish, applied in order. They give the checkpoint's
    names, shapes and dtypes where the trainer's differ. `on_publish` gets a report of every publish, and `on_upload` of
    every commit, on the uploader's thread. Upload trouble is a warning of the logger "deltawire". `codec` is that of a
    run that begins here: "subset", "class", "auto" or "gap". The latter takes a tenth more bytes, and readers of any
    version know it. "class" takes a third fewer than "subset", and is read against the weights before it. So a version
    is of it only where it is sent as it was captured, and while every replica's heartbeat says that it reads it; others
    are of "subset". So is a tensor of which the parts that ranks or servers' workers hold are small. "auto" chooses for
    each version what is served sooner. A run that is continued keeps the codecs it lists.

    The baseline is a copy of the weights last captured. That of CUDA tensors lies beside them from the second publish
    on, if a tenth of the device then stays free; with "device" from the first comparison on. It goes back to the host
    when memory runs out. All else lies in host memory, as everything does with "host". With "file" it lies in nameless
    files in the folder of temporary files (TMPDIR), which the kernel keeps in memory only while there is room.

    A bucket that already holds a run continues it: the baseline is rebuilt from the last commit, and the first publish
    is the difference. With run="supersede" a new run begins instead. It names where the old one stood, and followers
    move on to it. A first publish may look like no continuation, as of a trainer that was restarted from its base and
    not from its checkpoint. Then a warning gives the figures. With resume="require" such a publish is refused, as is a
    bucket without a run.

    A job whose weights are sharded (FSDP2, HSDP, tensor parallel) passes its `process_group`. Every rank then makes a
    publisher, and every rank makes each of its calls: opening, `publish`, `flush`, `close`. A rank publishes the shards
    it holds, as DTensors or plain tensors, and nothing is gathered. Rank 0 alone reads `signing_key` and `assets`, and
    commits once every rank's file is durable. A run that begins without a base starts as a delta from all-zero bits.

    `signing_key`, a file written by `deltawire keygen`, signs every record. A run that began with a key continues with
    it only (BadSignature). `compactors` are public keys that may sign folds and anchors of a run that begins here.

    A process that ends without `close` waits up to 30 seconds for what is on its way, 10 after an error. One that a
    signal ends does not wait. One trainer has one publisher, for one thread. Raises BucketError, FormatError,
    ChainError on opening; TypeError and ValueError for options that it does not take.
    """

    _devices: Devices = Cuda()

    def __init__(
        self,
        bucket: Bucket,
        *,
        base: str | Path | None = None,
        codec: str = "subset",
        dtype: str | Mapping[str, str] = "BF16",
        assets: str | Path | None = None,
        prepare: Iterable[Prepare] = (),
        run: Literal["continue", "supersede"] = "continue",
        resume: Literal["warn", "require"] = "warn",
        signing_key: str | Path | None = None,
        compactors: Iterable[str | Path] = (),
        baseline: Asked = "auto",
        process_group: Any = None,
        on_publish: Callable[[PublishReport], None] = lambda report: None,
        on_upload: Callable[[UploadReport], None] = lambda report: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        require_options(bucket, codec=codec, run=run, resume=resume, baseline=baseline)
        self.bucket, self._owner, self._prepare = bucket, os.getpid(), tuple(prepare)
        self._must_resume, self._is_torn = resume == "require", False
        self._refused: DeltaWireError | None = None
        folder = Path(assets) if assets is not None else None
        asked = "class" in LISTED[codec] and is_first(process_group)
        receivers = Receivers(Typed(bucket), asked=asked, clock=clock)
        chooser = Chooser(receivers, codec)
        self._spool = TemporaryFolder()
        try:
            own = ScratchFiles(self._spool.path).copy if baseline == "file" else Bits.copy
            options = CaptureOptions(base, dtype, folder, clock, run == "supersede", codecs=LISTED[codec], own=own)
            options = replace(options, choose=chooser.choose, baseline=baseline, devices=self._devices)
            keys = Keys(signing_key, tuple(compactors))
            roles = open_roles(bucket, options, keys, self._spool.path, process_group, must_resume=self._must_resume)
        except BaseException:
            self._spool.close()
            raise
        self._capturer, self._before = roles.capturer, roles.before
        tip, adds_up = roles.capturer.resumed, process_group is not None
        self._on_publish, heard = chooser.hear(on_publish), chooser.hear_upload(on_upload)
        self._uploader = Uploader(roles.sender, where=bucket.url, tip=tip, adds_up=adds_up, on_upload=heard)
        self._beats = TrainerBeats(Typed(bucket), self._uploader.beat, receivers.look) if roles.leads else None
        atexit.register(self._close_at_exit)

    def __enter__(self) -> "Publisher":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self.close(timeout=None if error is None else AFTER_ERROR)
        except DeltaWireError as problem:
            if error is None:
                raise
            error.add_note(f"deltawire: {problem}")  # the error under way is what the caller's handlers wait for

    @property
    def position(self) -> Position | None:
        """The newest committed position; None before the first commit."""
        return self._uploader.position

    def publish(
        self,
        tensors: Pairs | Mapping[str, Any],
        *,
        step: int | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> PublishReport:
        """Capture the weights as the next version and return; the upload goes on behind.

        `tensors`: (checkpoint name, tensor) pairs, a mapping, or a module, whose parameters are taken; torch or numpy,
        any float dtype, CPU or CUDA. Pairs are taken one at a time, so memory grows by one tensor and one delta. Those
        of a mapping or a module whose baseline lies on a device are compared together, which is fastest. The first call
        fixes the set of names, and which are tied; later calls give exactly that set, a tied tensor by any of its names
        or by all. `metrics` go into the commit as numbers.

        Raises UnknownTensor, MissingTensor, ShapeMismatch, DtypeMismatch; CopiesDiffer for a tied tensor whose names
        have different bits; ConcurrentWrite for weights that are written while a device compares them. What was
        captured before the error goes with the next good call. Raises ChainError once another writer has taken the
        run. In a sharded job all ranks raise together, those without trouble of their own RankFailed. Only a new
        publisher goes on after WrongBase, an interrupt, or a watchdog's exception.
        """
        started = time.perf_counter()
        self._is_torn = self._is_torn or self._capturer.transition.unfinished
        cut = self._uploader.begin_capture()
        try:
            pairs, stay = self._pairs(tensors), given.stay(tensors, self._prepare)
            with as_raised():
                capture = self._capturer.capture(pairs, step=step, metrics=metrics, cut=cut, stay=stay)
            jump = self._jump(capture)
            queued = self._uploader.add(capture.versions, cut=capture.cut)
            self._capturer.transition.end()
        except (KeyboardInterrupt, SystemExit, MemoryError):
            self._is_torn = True
            raise
        finally:
            self._uploader.end_capture()
        report = self._report(capture, queued, started)
        self._on_publish(report)
        if jump is not None:  # not before it is queued: a filter may make an error of it
            warnings.warn(f'{jump}; Publisher(resume="require") would refuse this', stacklevel=2)
        return report

    def _pairs(self, tensors: Pairs | Mapping[str, Any]) -> Pairs:
        """What to capture. A refusal is raised when this is iterated: a rank that refuses must tell the others so."""
        self._uploader.require_open()
        if self._refused is not None:
            raise self._refused
        self._require_owner()
        if self._is_torn:
            raise DeltaWireError(
                f"{self.bucket.url}: a publish was interrupted, so what it captured is not known; close this publisher "
                "and open a new one, which publishes the difference from the last commit"
            )
        yield from given.prepared(tensors, self._prepare)

    def _jump(self, capture: Capture) -> str | None:
        """What makes a run's first publish after it was resumed no continuation; the same on every rank. Raises
        WrongBase where one is required."""
        before, self._before = self._before, None
        if before is None:
            return None
        newest = capture.versions[-1]
        said = resuming.jump(
            before,
            root=root_of(newest.run.table, newest.digests),
            step=newest.step,
            changed=capture.changed,
            total=self._capturer.total,
            wire_bytes=capture.wire_bytes or 0,
        )
        if said is not None and self._must_resume:
            self._refused = WrongBase(f"{self.bucket.url}: {said}. Nothing was published")
            raise self._refused
        return said

    def _require_owner(self) -> None:
        """Raise DeltaWireError in a forked child, which has no uploader: nothing it published would ever arrive."""
        if os.getpid() != self._owner:
            raise DeltaWireError(
                f"{self.bucket.url}: this publisher was opened by process {self._owner}, and a forked child cannot use "
                "it; publish from the parent, or open a publisher in the child for a bucket of its own"
            )

    def _report(self, capture: Capture, queued: Queued, started: float) -> PublishReport:
        newest, backlog, baseline = capture.versions[-1], queued.backlog, self._capturer.baseline
        return PublishReport(
            run=newest.run.run,
            version=newest.version,
            step=newest.step,
            changed=capture.changed,
            total=self._capturer.total,
            wire_bytes=capture.wire_bytes or 0,
            is_encoded=capture.wire_bytes is not None,
            model_bytes=self._capturer.model_bytes,
            seconds=time.perf_counter() - started,
            compare_seconds=capture.compare_seconds,
            waiting=backlog.versions,
            waiting_bytes=backlog.nbytes,
            waiting_bound=self._capturer.held_bytes + backlog.closed_bytes,
            problem=str(queued.problem) if queued.problem else None,
            codec=newest.codec,
            baseline=baseline.where,
            baseline_bytes=baseline.nbytes,
            baseline_device_bytes=baseline.device_bytes,
            reason=newest.reason,
        )

    def flush(self, timeout: float | None = None) -> Position | None:
        """Wait until everything captured is committed; the newest position. An upload that failed is tried again at
        once.

        Raises what stops the upload when waiting cannot help: any BucketError but Unavailable, or Forked. Raises
        Unavailable when `timeout` seconds were not enough. Nothing is forgotten: call again, or publish on.
        """
        self._require_owner()
        return self._uploader.flush(timeout)

    def close(self, timeout: float | None = None) -> None:
        """Flush, then stop the uploader, within `timeout` seconds. Raises what `flush` raises, after stopping. In a
        forked child it does nothing: what waits, and its files, are the parent's."""
        if os.getpid() != self._owner:
            return
        started, patience = time.monotonic(), 0.0
        try:
            if not self._uploader.is_stopping:
                self.flush(timeout)
                left = GOODBYE if timeout is None else started + timeout - time.monotonic()
                patience = min(GOODBYE, max(left, 0.0))
        finally:
            atexit.unregister(self._close_at_exit)
            if self._beats is not None:
                self._beats.close()
            self._uploader.stop(patience)
            self._capturer.close()
            self._spool.close()

    def _close_at_exit(self) -> None:
        """Send what waits, if that does not take too long; Python prints what this raises. A forked child has nothing
        to send."""
        if os.getpid() != self._owner:
            return
        try:
            self.close(AFTER_ERROR if hasattr(sys, "last_value") else AT_EXIT)
        except DeltaWireError as problem:
            if self._uploader.is_idle:
                raise
            hint = " (close() would have waited for them)" if isinstance(problem, Unavailable) else ""
            raise DeltaWireError(f"the process ends with changes not in the bucket{hint}: {problem}") from None
