"""The trainer's side: capture what changed, keep it until it is durable, never make the trainer wait for the network.

    committed + frozen attempt + waiting + partial == baseline        always, so a failure forgets nothing

`publish` compares with the baseline, moves it, and adds the change to what waits; a thread of ours takes all that
waits as one folded attempt, freezes its bytes, and appends it to the run log, again and again until it is durable.
"""

import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from deltawire import log, pending, signing
from deltawire.buckets.base import Bucket
from deltawire.capture import Capturer
from deltawire.errors import BucketError, ChainError, DeltaWireError, Unavailable, UnknownVersion
from deltawire.log import Attempt
from deltawire.manifests import Position
from deltawire.pending import Captured
from deltawire.reports import PublishReport, UploadReport

FIRST_RETRY = 0.5
"""seconds; doubles up to LAST_RETRY while the store says "later" """
LAST_RETRY = 30.0
Pairs = Iterable[tuple[str, Any]]
"""(name, tensor)"""
Prepare = Callable[[Pairs], Pairs]


class Publisher:
    """Publishes each new policy to a bucket as a delta.

    `base`: the checkpoint both sides start from, a folder or a Hub repository; version 0 then is a reference to it.
    Without it version 0 is an anchor, a full checkpoint in the bucket, with the config and tokenizer files of `assets`.
    `dtype` is what fp32 and fp64 tensors are cast to, as the server holds them ("BF16"), and with "F16" bf16 ones too;
    `Bits` are shipped as they are. With a base, its dtypes rule.
    `prepare` are functions over the (name, tensor) pairs of a publish, applied in order, that give the checkpoint's
    names, shapes and dtypes where the trainer's differ.
    `codec`: "gap". `on_upload` hears of every commit, on the uploader's thread.

    A bucket that already holds a run continues it: the baseline is rebuilt from the last commit, and the first publish
    is the difference. With run="supersede" a new run begins instead, which names where that one stood: followers
    move on to it.

    `signing_key`, a file written by `deltawire keygen`, signs every record; `compactors` are public keys that may sign
    folds and anchors of a run that begins here.

    Not for several threads at once: one trainer, one publisher. Raises BucketError, FormatError, ChainError on opening.
    """

    def __init__(
        self,
        bucket: Bucket,
        *,
        base: str | Path | None = None,
        codec: str = "gap",
        dtype: str = "BF16",
        assets: str | Path | None = None,
        prepare: Iterable[Prepare] = (),
        run: Literal["continue", "supersede"] = "continue",
        signing_key: str | Path | None = None,
        compactors: Iterable[str | Path] = (),
        on_upload: Callable[[UploadReport], None] = lambda report: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if codec != "gap":
            raise UnknownVersion(f'codec {codec!r} cannot be published; use "gap" ("raw" is for dw.encode alone)')
        self.bucket = bucket
        self._on_upload, self._prepare = on_upload, tuple(prepare)
        self._key = None if signing_key is None else signing.read_key(signing_key)
        self._writer = f"{socket.gethostname()} pid {os.getpid()}"
        delegates = tuple(sorted(signing.trust(compactors).keys))
        self._spool = tempfile.TemporaryDirectory(prefix="deltawire-", ignore_cleanup_errors=True)
        spool = Path(self._spool.name)
        try:
            self._capturer = Capturer(
                bucket,
                spool,
                base=base,
                dtype=dtype,
                assets=assets,
                clock=clock,
                supersede=run == "supersede",
                compactors=delegates,
            )
        except BaseException:
            self._spool.cleanup()
            raise
        self._changed = threading.Condition()
        self._waiting: list[Captured] = []
        self._work: Captured | None = None
        self._committed: Position | None = self._capturer.resumed
        self._committed_hash: str | None = self._capturer.resumed_hash
        self._problem: DeltaWireError | None = None
        self._failures = 0
        self._hurry = self._closing = self._died = False
        self._thread = threading.Thread(target=self._upload_forever, name="deltawire-upload", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Publisher":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self.close(timeout=None if error is None else 10.0)
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
        calls must give exactly that set. `metrics` go into the commit as numbers.

        Raises UnknownTensor, MissingTensor, ShapeMismatch, DtypeMismatch; what was captured before the error is kept
        and goes with the next good call. Raises ChainError, too, once another writer has taken the run.
        """
        if isinstance(self._problem, ChainError) or self._died or self._closing:
            raise self._problem or DeltaWireError(f"{self.bucket.url}: this publisher is closed; open a new one")
        started = time.perf_counter()
        pairs: Pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
        for prepare in self._prepare:
            pairs = prepare(pairs)
        step = None if step is None else int(step)
        numbers = {name: float(value) for name, value in (metrics or {}).items()}
        versions, compare_seconds = self._capturer.capture(pairs, step=step, metrics=numbers)
        newest = versions[-1]
        wire_bytes = newest.payload_bytes
        with self._changed:
            for captured in versions:
                self._enqueue(captured)
            held = [*self._waiting, *([self._work] if self._work else [])]
            problem = str(self._problem) if self._problem else None
            self._changed.notify_all()
        first = newest.parent is None
        return PublishReport(
            run=newest.run.run,
            version=newest.version,
            step=step,
            changed=self._capturer.total if first else newest.delta.changed,
            total=self._capturer.total,
            wire_bytes=wire_bytes,
            model_bytes=self._capturer.model_bytes,
            seconds=time.perf_counter() - started,
            compare_seconds=compare_seconds,
            waiting=sum(captured.versions for captured in held),
            waiting_bytes=sum(captured.nbytes for captured in held),
            waiting_bound=self._capturer.model_bytes + (self._work.nbytes if self._work else 0),
            problem=problem,
        )

    def flush(self, timeout: float | None = None) -> Position | None:
        """Wait until everything captured is committed; the newest position. An upload that failed is tried again at
        once.

        Raises what stops the upload when waiting cannot help (AccessRefused, NotFound, OutOfSpace, Forked), Unavailable
        when `timeout` seconds were not enough. Nothing is forgotten: call again, or publish on.
        """
        with self._changed:
            before, self._hurry = self._failures, True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._idle() or self._is_hopeless(before), timeout)
            if self._idle() and not self._died:
                return self._committed
            if self._is_hopeless(before):
                raise self._problem or DeltaWireError(f"{self.bucket.url}: closed before all was committed")
            raise Unavailable(f"{self.bucket.url}: not all committed after {timeout} s: {self._problem or 'uploading'}")

    def close(self, timeout: float | None = None) -> None:
        """Flush, then stop the uploader. Raises what `flush` raises, after stopping."""
        try:
            if not self._closing:
                self.flush(timeout)
        finally:
            with self._changed:
                self._closing = True
                self._changed.notify_all()
            self._thread.join(timeout=5.0)
            self._spool.cleanup()

    def _enqueue(self, captured: Captured) -> None:
        """Fold into what waits; a run's first version is no delta, so nothing folds into it."""
        if self._waiting and self._waiting[-1].parent is not None:
            self._waiting[-1] = pending.fold(self._waiting[-1], captured)
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
                attempt = pending.freeze(captured, parent_hash=self._committed_hash, writer=self._writer, key=self._key)
                self._upload(captured, attempt)
        except Exception as error:  # a thread that died silently would leave flush() waiting for ever
            with self._changed:
                self._died, self._problem = True, DeltaWireError(f"the uploader stopped: {error!r}")
                self._problem.__cause__ = error
                self._changed.notify_all()

    def _take_work(self) -> Captured | None:
        """The oldest of what waits, which nothing folds into any more; None when closing."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._waiting)
            if self._closing:
                return None
            self._work = self._waiting.pop(0)
            return self._work

    def _upload(self, captured: Captured, attempt: Attempt) -> None:
        """Append the frozen attempt, however often it takes; only a commit made durable drops the change."""
        started, delay, tries = time.monotonic(), FIRST_RETRY, 0
        while True:
            tries += 1
            try:
                log.append(self.bucket, attempt)
                break
            except (BucketError, ChainError) as error:
                with self._changed:
                    self._problem, self._failures = error, self._failures + 1
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._closing or self._hurry, delay)
                    self._hurry = False
                    if self._closing:
                        return
                delay = min(2 * delay, LAST_RETRY)
        seconds = time.monotonic() - started
        for data in attempt.payloads.values():
            if isinstance(data, Path):
                data.unlink(missing_ok=True)  # an anchor's files are as large as the model, and may lie in memory
        with self._changed:
            self._committed, self._committed_hash = attempt.commit.position, attempt.hash
            self._work, self._problem = None, None
            self._hurry = False
            self._changed.notify_all()
        commit = attempt.commit
        self._on_upload(
            UploadReport(commit.position, commit.parent, captured.versions, commit.wire_bytes, seconds, tries)
        )
