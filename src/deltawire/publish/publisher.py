"""The trainer's side: capture what changed, keep it until it is durable, never make the trainer wait for the network.

    committed + frozen attempt + waiting + partial == baseline        always, so a failure forgets nothing

`publish` compares with the baseline, moves it, and adds the change to what waits; a thread of ours takes all that
waits as one folded attempt, freezes its bytes, and appends it to the run log, again and again until it is durable.
"""

import atexit
import os
import shutil
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from deltawire.buckets.atomic import file_system_errors
from deltawire.buckets.base import Bucket
from deltawire.buckets.wrappers import Typed
from deltawire.errors import (
    BucketError,
    ChainError,
    DeltaWireError,
    FormatError,
    NotFound,
    RankFailed,
    Unavailable,
    UnknownVersion,
    WrongBase,
)
from deltawire.publish import fsdp, pending, resuming
from deltawire.publish.capture import Capture, Capturer, require_signer
from deltawire.publish.pending import Captured, Part
from deltawire.publish.reports import PublishReport, UploadReport
from deltawire.publish.resuming import RunState
from deltawire.publish.sharded.capture import ShardCapturer
from deltawire.publish.sharded.ranks import Ranks
from deltawire.publish.sharded.senders import sender_of
from deltawire.runlog import signing
from deltawire.runlog.records import Position
from deltawire.runlog.signing import SigningKey
from deltawire.weights.digest import root as root_of
from deltawire.weights.tensors import named

FIRST_RETRY = 0.5
"""seconds; doubles up to LAST_RETRY while the store says "later" """
LAST_RETRY = 30.0
GOODBYE = 30.0
"""seconds that rank 0, when it closes, waits for the other ranks to hear of the last commit"""
AT_EXIT = 30.0
"""seconds that a process which ends without closing its publisher waits for what is on its way"""
AFTER_ERROR = 10.0
"""seconds that it waits, and leaving a `with`, when an error ends it"""
Pairs = Iterable[tuple[str, Any]]
"""(name, tensor)"""
Prepare = Callable[[Pairs], Pairs]


class Publisher:
    """Publishes each new policy to a bucket as a delta.

    `base`: the checkpoint both sides start from, a folder or a Hub repository; version 0 then is a reference to it.
    Readers of a run that starts from a folder name a folder of their own, and so does a trainer that continues it.
    Without it version 0 is an anchor, a full checkpoint in the bucket, with the config and tokenizer files of `assets`.
    `dtype` is what fp32 and fp64 tensors are cast to, as the server holds them ("BF16"), and with "F16" bf16 ones too.
    Where a server holds some in fp32, it is a mapping: {"*.A_log": "F32", "*": "BF16"}. Its keys are patterns (fnmatch)
    over the checkpoint's names, of which the first that fits rules; "*" is for all that no other fits, "BF16" unless
    given. What the model keeps in fp32 ships as F32 where `checkpoint_tensors` gives it; given as plain pairs beside
    16-bit tensors it is rounded with a warning. `Bits` are shipped as they are, unless a pattern other than "*" fits.
    With a base, its dtypes rule; a pattern may still ask for values rounded to fewer bits.
    `prepare` are functions over the (name, tensor) pairs of a publish, applied in order, that give the checkpoint's
    names, shapes and dtypes where the trainer's differ.
    `codec`: "gap". `on_upload` hears of every commit, on the uploader's thread.

    A bucket that already holds a run continues it: the baseline is rebuilt from the last commit, and the first publish
    is the difference. With run="supersede" a new run begins instead, which names where that one stood: followers
    move on to it. A first publish that looks like no continuation (the trainer was restarted from its base, not from
    its checkpoint) is warned of, with the figure. With resume="require" it is refused, as is a bucket without a run.

    A job whose weights are sharded (FSDP2, HSDP, tensor parallel) passes its `process_group`; then every rank makes a
    publisher, and every rank makes each of its calls: opening, `publish`, `flush`, `close`. A rank publishes the shards
    it holds, as DTensors or plain tensors, and nothing is gathered. Rank 0 alone reads `signing_key` and `assets`, and
    commits once every rank's file is durable. A run that begins without a base starts as a delta from all-zero bits.

    `signing_key`, a file written by `deltawire keygen`, signs every record; a run that began with a key continues with
    it only (BadSignature). `compactors` are public keys that may sign folds and anchors of a run that begins here.

    A process that ends without `close` waits up to 30 seconds for what is on its way, 10 after an error; one that a
    signal ends, not at all. Not for several threads at once: one trainer, one publisher. Raises BucketError,
    FormatError, ChainError on opening; TypeError and ValueError for options that are none.
    """

    def __init__(
        self,
        bucket: Bucket,
        *,
        base: str | Path | None = None,
        codec: str = "gap",
        dtype: str | Mapping[str, str] = "BF16",
        assets: str | Path | None = None,
        prepare: Iterable[Prepare] = (),
        run: Literal["continue", "supersede"] = "continue",
        resume: Literal["warn", "require"] = "warn",
        signing_key: str | Path | None = None,
        compactors: Iterable[str | Path] = (),
        process_group: Any = None,
        on_upload: Callable[[UploadReport], None] = lambda report: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if codec != "gap":
            raise UnknownVersion(f'codec {codec!r} cannot be published; use "gap" ("raw" is for dw.encode alone)')
        if isinstance(bucket, str):
            raise TypeError("a Publisher takes an opened bucket, not its address: pass deltawire.open_bucket(address)")
        if run not in ("continue", "supersede"):
            raise ValueError(f'run={run!r}: "continue" or "supersede"')
        if resume not in ("warn", "require") or (resume, run) == ("require", "supersede"):
            raise ValueError(f'resume={resume!r}: "warn", or "require", which goes with run="continue"')
        self.bucket, self._owner = bucket, os.getpid()
        self._on_upload, self._prepare, self._sharded = on_upload, tuple(prepare), process_group is not None
        with file_system_errors("the folder of temporary files (TMPDIR chooses another)"):
            self._spool = Path(tempfile.mkdtemp(prefix="deltawire-"))
        self._resume: Literal["warn", "require"] = resume
        self._refused: DeltaWireError | None = None
        begin = {"base": base, "dtype": dtype, "assets": assets, "clock": clock, "supersede": run == "supersede"}
        try:
            self._open(begin, signing_key, compactors, process_group)
        except BaseException:
            shutil.rmtree(self._spool, ignore_errors=True)
            raise
        self._lock = threading.RLock()  # entered by itself: a signal's exception in Condition.__exit__ would keep it
        self._changed = threading.Condition(self._lock)
        self._waiting: list[Captured] = []
        self._work: Captured | None = None
        self._committed: Position | None = self._capturer.resumed
        self._committed_hash: str | None = self._capturer.resumed_hash
        self._problem: DeltaWireError | None = None
        self._failures = 0
        self._cut = -1
        self._summing = self._hurry = self._closing = self._died = self._torn = False
        self._thread = threading.Thread(target=self._upload_forever, name="deltawire-upload", daemon=True)
        self._thread.start()
        atexit.register(self._close_at_exit)

    def _open(
        self, begin: dict[str, Any], key_file: str | Path | None, compactors: Iterable[str | Path], process_group: Any
    ) -> None:
        """Find where the bucket stands, and settle who makes versions durable."""
        key: list[SigningKey] = []

        def read_keys() -> tuple[str, ...]:
            if key_file is not None:
                key.append(signing.read_key(key_file))
            if not begin["supersede"]:
                require_signer(self.bucket, key[0].public if key else None)
            return tuple(sorted(signing.trust(compactors).keys))

        ranks = None if process_group is None else Ranks(process_group)
        delegates = read_keys() if ranks is None else ranks.from_first(read_keys)  # the private key stays on rank 0
        self._capturer: Capturer | ShardCapturer
        if ranks is None:
            self._capturer = Capturer(self.bucket, self._spool, compactors=delegates, **begin)
        else:
            self._capturer = ShardCapturer(self.bucket, ranks, compactors=delegates, **begin)
        self._before = self._state_before(ranks)
        self._sender = sender_of(Typed(self.bucket), ranks, next(iter(key), None))

    def _state_before(self, ranks: Ranks | None) -> RunState | None:
        """What the run looked like that is continued. Raises NotFound where one was required."""
        if (position := self._capturer.resumed) is None:
            if self._resume == "require":
                raise NotFound(
                    f'{self.bucket.url} holds no run, and resume="require" asks for one: check the address, or begin '
                    "a run without it"
                )
            return None
        look = partial(resuming.run_state, self.bucket, position)
        return look() if ranks is None else ranks.from_first(look)

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
        return self._committed

    def publish(
        self,
        tensors: Pairs | Mapping[str, Any],
        *,
        step: int | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> PublishReport:
        """Capture the weights as the next version and return; the upload goes on behind.

        `tensors`: (checkpoint name, tensor) pairs, or a mapping; torch or numpy, any float dtype, CPU or CUDA. Taken
        one at a time, so memory grows by one tensor and one delta. The first call fixes the set of names; later
        calls must give exactly that set. A tied tensor may be given by any of its names, or by all: the first call also
        fixes what is tied, by memory, and in the base's files by config and bits. `metrics` go into the commit as
        numbers.

        Raises UnknownTensor, MissingTensor, ShapeMismatch, DtypeMismatch, also for a pattern of `dtype` that fits none
        of the names, and CopiesDiffer for a tied tensor whose names have different bits; what was captured before the
        error is kept and goes with the next good call. Raises ChainError once another writer has taken the run. In a
        sharded job all ranks raise together: those without trouble of their own RankFailed, CopiesDiffer where ranks
        disagree, MissingTensor where they give other names or another `step`.

        Only a new publisher goes on after these: WrongBase, by which resume="require" refuses the first publish; an
        interrupt (Ctrl-C, no memory); an exception of somebody else's, such as a watchdog's, between steps that go
        together.
        """
        started = time.perf_counter()
        with self._lock:
            self._summing, cut = self._sharded, self._cut
            self._torn = self._torn or self._capturer.transition.unfinished
        try:
            capture = self._capturer.capture(self._pairs(tensors), step=step, metrics=metrics, cut=cut)
            jump = self._jump(capture)
            with self._lock:
                self._cut = max(self._cut, capture.cut)
                for captured in capture.versions:
                    self._enqueue(captured)
                self._capturer.transition.end()
                report = self._report(capture, started)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            self._torn = True
            raise
        finally:
            with self._lock:
                self._summing = False
                self._changed.notify_all()
        if jump is not None:  # not before it is enqueued: a filter may make an error of it
            warnings.warn(f'{jump}; Publisher(resume="require") would refuse this', stacklevel=2)
        return report

    def _pairs(self, tensors: Pairs | Mapping[str, Any]) -> Pairs:
        """What to capture. A refusal is raised when this is iterated: a rank that refuses must tell the others so."""
        if isinstance(self._problem, ChainError | RankFailed) or self._died or self._closing:
            raise self._problem or DeltaWireError(f"{self.bucket.url}: this publisher is closed; open a new one")
        if self._refused is not None:
            raise self._refused
        self._require_owner()
        if self._torn:
            raise DeltaWireError(
                f"{self.bucket.url}: a publish was interrupted, so what it captured is not known; close this publisher "
                "and open a new one, which publishes the difference from the last commit"
            )
        pairs: Pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
        if isinstance(pairs, Iterable):
            pairs = fsdp.owned(pairs)  # before `prepare`, which may compute from them
        for prepare in self._prepare:
            pairs = prepare(pairs)
        yield from named(pairs)

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
            wire_bytes=capture.wire_bytes,
        )
        if said is not None and self._resume == "require":
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

    def _report(self, capture: Capture, started: float) -> PublishReport:
        newest = capture.versions[-1]
        closed = [*self._waiting[:-1], *([self._work] if self._work else [])]
        held = [*closed, *self._waiting[-1:]]
        return PublishReport(
            run=newest.run.run,
            version=newest.version,
            step=newest.step,
            changed=capture.changed,
            total=self._capturer.total,
            wire_bytes=capture.wire_bytes,
            model_bytes=self._capturer.model_bytes,
            seconds=time.perf_counter() - started,
            compare_seconds=capture.compare_seconds,
            waiting=sum(captured.versions for captured in held),
            waiting_bytes=sum(captured.nbytes for captured in held),
            waiting_bound=self._capturer.held_bytes + sum(captured.nbytes for captured in closed),
            problem=str(self._problem) if self._problem else None,
        )

    def flush(self, timeout: float | None = None) -> Position | None:
        """Wait until everything captured is committed; the newest position. An upload that failed is tried again at
        once.

        Raises what stops the upload when waiting cannot help: any BucketError but Unavailable, or Forked. Raises
        Unavailable when `timeout` seconds were not enough. Nothing is forgotten: call again, or publish on.
        """
        self._require_owner()
        with self._lock:
            before, self._hurry, self._summing = self._failures, True, False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._idle() or self._is_hopeless(before), timeout)
            if self._idle() and not self._died:
                return self._committed
            if self._is_hopeless(before):
                raise self._problem or DeltaWireError(f"{self.bucket.url}: closed before all was committed")
            raise Unavailable(f"{self.bucket.url}: not all committed after {timeout} s: {self._problem or 'uploading'}")

    def close(self, timeout: float | None = None) -> None:
        """Flush, then stop the uploader, within `timeout` seconds. Raises what `flush` raises, after stopping. In a
        forked child it does nothing: what waits, and its files, are the parent's."""
        if os.getpid() != self._owner:
            return
        started, patience = time.monotonic(), 0.0
        try:
            if not self._closing:
                self.flush(timeout)
                left = GOODBYE if timeout is None else started + timeout - time.monotonic()
                patience = min(GOODBYE, max(left, 0.0))
        finally:
            with self._lock:
                self._closing = True
                self._changed.notify_all()
            atexit.unregister(self._close_at_exit)
            self._thread.join(timeout=5.0)
            self._sender.close(patience)
            self._capturer.close()
            shutil.rmtree(self._spool, ignore_errors=True)

    def _close_at_exit(self) -> None:
        """Send what waits, if that does not take too long; Python prints what this raises. A forked child has nothing
        to send."""
        if os.getpid() != self._owner:
            return
        try:
            self.close(AFTER_ERROR if hasattr(sys, "last_value") else AT_EXIT)
        except DeltaWireError as problem:
            if self._idle():
                raise
            hint = " (close() would have waited for them)" if isinstance(problem, Unavailable) else ""
            raise DeltaWireError(f"the process ends with changes not in the bucket{hint}: {problem}") from None

    def _enqueue(self, captured: Captured) -> None:
        """Fold into what waits; a run's first version is no delta, so nothing folds into it, nor into a version that
        rank 0 of a sharded job has begun to send."""
        last = self._waiting[-1] if self._waiting else None
        if last is not None and last.parent is not None and last.version > self._cut:
            self._waiting[-1] = pending.fold(last, captured)
        elif self._work is not None and captured.parent is not None:
            self._waiting.append(replace(captured, payloads=None))  # it will wait: its bytes are made when it is sent
        else:
            self._waiting.append(captured)

    def _idle(self) -> bool:
        return not self._waiting and self._work is None

    def _is_hopeless(self, before: int) -> bool:
        """Whether waiting cannot help: nobody uploads, or a try failed for good since there were `before` failures."""
        fresh = self._failures > before and not isinstance(self._problem, Unavailable | None)
        return self._closing or self._died or fresh

    def _upload_forever(self) -> None:
        try:
            while captured := self._take_work():
                self._upload(captured, pending.part_of(captured))
        except Exception as error:  # a thread that died silently would leave flush() waiting for ever
            problem = error if isinstance(error, DeltaWireError) else DeltaWireError(f"the uploader stopped: {error!r}")
            problem.__cause__ = error.__cause__ if problem is error else error
            try:
                self._sender.tell(problem)
            finally:
                with self._changed:
                    self._died, self._problem = True, problem
                    self._changed.notify_all()

    def _take_work(self) -> Captured | None:
        """The oldest of what waits, which nothing folds into any more; None when closing."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._waiting)
        end = self._sender.next_range(lambda: self._closing)
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._may_begin(end))
            if self._closing:
                return None
            self._work = self._waiting.pop(0)
            self._cut = self._work.version
            return self._work

    def _may_begin(self, end: int | None) -> bool:
        """Rank 0 must not begin while a publish adds up: the sum tells all ranks what is begun, before they fold. The
        others may be late with the version that they are told to end at."""
        if end is None:
            return bool(self._waiting) and not self._summing
        return bool(self._waiting) and self._waiting[0].version == end

    def _upload(self, captured: Captured, part: Part) -> None:
        """Send the frozen attempt, however often it takes; only a commit made durable drops the change."""
        started, delay, tries = time.monotonic(), FIRST_RETRY, 0
        while True:
            tries += 1
            try:
                landed = self._sender.send(captured, part, self._committed_hash, lambda: self._closing)
                break
            except (BucketError, ChainError, FormatError) as error:
                self._sender.tell(error)
                with self._changed:
                    self._problem, self._failures = error, self._failures + 1
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._closing or self._hurry, delay)
                    self._hurry = False
                    if self._closing:
                        return
                delay = min(2 * delay, LAST_RETRY)
        if landed is None:
            return
        seconds = time.monotonic() - started
        for data in part.payloads.values():
            if isinstance(data, Path):
                data.unlink(missing_ok=True)  # an anchor's files are as large as the model, and may lie in memory
        with self._changed:
            self._committed, self._committed_hash = landed.position, landed.hash
            self._work, self._problem = None, None
            self._hurry = False
            self._changed.notify_all()
        self._on_upload(
            UploadReport(landed.position, captured.parent, captured.versions, landed.wire_bytes, seconds, tries)
        )
