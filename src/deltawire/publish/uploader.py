"""Sends what was captured behind the training: one thread, which tries again until a version is durable."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deltawire.errors import BucketError, ChainError, DeltaWireError, FormatError, RankFailed, Unavailable
from deltawire.publish import pending
from deltawire.publish.invariants import nothing_is_forgotten
from deltawire.publish.pending import Captured, Shipment
from deltawire.publish.queue import Backlog, Queue
from deltawire.publish.reports import UploadReport
from deltawire.publish.sender import Committed, Sender, Tip
from deltawire.publish.trouble import Trouble
from deltawire.runlog.heartbeats import TrainerBeat
from deltawire.runlog.invariants import require
from deltawire.runlog.records import Position

FIRST_RETRY = 0.5
"""seconds; doubles up to LAST_RETRY while the store says "later" """
LAST_RETRY = 30.0
JOIN = 5.0
"""seconds that `stop` waits for the thread, which may be inside a call that does not return"""


@dataclass(frozen=True, slots=True)
class Queued:
    """What was not committed when versions were queued, and the last upload error, if there is one."""

    backlog: Backlog
    problem: DeltaWireError | None


class Uploader:
    """Holds the queue, and sends its versions in order through a `sender`. Any thread may call it.

    `where` names the bucket in errors, and `tip` is the commit that the run stands at. `adds_up` says that a capture
    adds up over ranks: while one does, no upload begins. `on_upload` gets a report of each commit, on the thread.
    """

    def __init__(
        self,
        sender: Sender,
        *,
        where: str,
        tip: Tip | None,
        adds_up: bool,
        on_upload: Callable[[UploadReport], None],
    ) -> None:
        self._sender, self._where, self._adds_up, self._on_upload = sender, where, adds_up, on_upload
        self._lock = threading.RLock()  # entered by itself: a signal's exception in Condition.__exit__ would keep it
        self._changed = threading.Condition(self._lock)
        self._queue, self._tip = Queue(), tip
        self._trouble = Trouble(where)
        self._following = 0 if tip is None else tip.position.version + 1
        self._problem: DeltaWireError | None = None
        self._failures = 0
        self._is_capturing = self._hurry = self._is_stopping = self._has_died = False
        self._thread = threading.Thread(target=self._run, name="deltawire-upload", daemon=True)
        self._thread.start()

    @property
    def position(self) -> Position | None:
        """The newest committed position; None before the first commit."""
        return self._tip.position if self._tip is not None else None

    @property
    def is_stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._is_stopping

    @property
    def is_idle(self) -> bool:
        """Whether everything queued is committed."""
        return self._queue.is_empty

    def require_open(self) -> None:
        """Raise what ended this uploader for good: another writer, a rank that is gone, `stop`."""
        if isinstance(self._problem, ChainError | RankFailed) or self._has_died or self._is_stopping:
            raise self._problem or DeltaWireError(f"{self._where}: this publisher is closed; open a new one")

    def beat(self) -> TrainerBeat | None:
        """What is said in the bucket of what waits; nothing before the run's first commit."""
        with self._lock:
            queue, committed, problem = self._queue, self.position, self._problem
        if committed is None:
            return None
        newest = queue.waiting[-1] if queue.waiting else queue.frozen
        return TrainerBeat(
            committed.run,
            version=newest.version if newest is not None else committed.version,
            committed=committed.version,
            waiting=queue.backlog.versions,
            waiting_bytes=queue.backlog.nbytes,
            problem=str(problem) if problem is not None else None,
        )

    def begin_capture(self) -> int:
        """A capture begins. The newest version that nothing folds into, as far as this process knows; -1 for none.

        Until `end_capture` no upload begins in a sharded job: its sum tells all ranks what has begun, before they fold.
        """
        with self._lock:
            self._is_capturing = self._adds_up
            return self._queue.cut

    def end_capture(self) -> None:
        """A capture ended, well or not: uploads may begin."""
        with self._lock:
            self._is_capturing = False
            self._changed.notify_all()

    def add(self, versions: Sequence[Captured], *, cut: int) -> Queued:
        """Queue versions, once nothing folds into version `cut` any more."""
        with self._lock:
            queue, following = self._queue.cut_at(cut), self._following
            for captured in versions:
                queue, following = queue.add(captured), captured.version + 1
            self._require_nothing_forgotten(queue, following)
            self._queue, self._following = queue, following  # at once: no signal is handled between the two
            self._changed.notify_all()
            return Queued(queue.backlog, self._problem)

    def flush(self, timeout: float | None) -> Position | None:
        """Wait until everything queued is committed; the newest position. A failed upload is tried again at once.

        Raises what stops the upload when waiting cannot help; Unavailable when `timeout` seconds were not enough.
        """
        with self._lock:
            before, self._hurry, self._is_capturing = self._failures, True, False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._queue.is_empty or self._is_hopeless(before), timeout)
            if self._queue.is_empty and not self._has_died:
                return self.position
            if self._is_hopeless(before):
                raise self._problem or DeltaWireError(f"{self._where}: closed before all was committed")
            raise Unavailable(f"{self._where}: not all committed after {timeout} s: {self._problem or 'uploading'}")

    def stop(self, patience: float) -> None:
        """Send nothing more; wait at most `patience` seconds for the job's other ranks."""
        with self._lock:
            self._is_stopping = True
            self._changed.notify_all()
        self._thread.join(timeout=JOIN)
        self._sender.close(patience)

    def _is_hopeless(self, before: int) -> bool:
        """Whether waiting cannot help: no thread uploads, or a try failed for good since `before` failures."""
        is_final = self._failures > before and not isinstance(self._problem, Unavailable | None)
        return self._is_stopping or self._has_died or is_final

    def _require_nothing_forgotten(self, queue: Queue, following: int) -> None:
        """Raise BrokenInvariant unless what is committed and what is queued lead to the version before `following`, the
        newest that was captured."""
        committed = None if self._tip is None else self._tip.position.version
        require(nothing_is_forgotten(committed, queue.held, following), where=self._where)

    # On the thread

    def _run(self) -> None:
        try:
            while captured := self._next():
                self._upload(captured, pending.ship(captured))
        except Exception as error:  # a thread that died silently would leave flush() waiting for ever
            problem = error if isinstance(error, DeltaWireError) else DeltaWireError(f"the uploader stopped: {error!r}")
            problem.__cause__ = error.__cause__ if problem is error else error
            try:
                self._sender.report_trouble(problem)
            finally:
                with self._changed:
                    self._has_died, self._problem = True, problem
                    self._changed.notify_all()

    def _next(self) -> Captured | None:
        """The oldest version that waits, frozen; None when stopping."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopping or self._queue.waiting)
        end = self._sender.next_range(lambda: self._is_stopping)
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopping or self._may_begin(end))
            if self._is_stopping:
                return None
            self._queue = self._queue.freeze()
            return self._queue.frozen

    def _may_begin(self, end: int | None) -> bool:
        """Whether the oldest version may be sent. A rank that was given an `end` may be late with that version."""
        return self._queue.can_freeze(end) and not (end is None and self._is_capturing)

    def _upload(self, captured: Captured, shipment: Shipment) -> None:
        """Send a frozen version, however often it takes; only a durable commit drops the change."""
        started, delay, attempts = time.monotonic(), FIRST_RETRY, 0
        while True:
            attempts += 1
            try:
                committed = self._sender.send(captured, shipment, self._tip, lambda: self._is_stopping)
                break
            except (BucketError, ChainError, FormatError) as error:
                self._sender.report_trouble(error)
                self._trouble.failed(error)
                if not self._wait_to_retry(error, delay):
                    return
                delay = min(2 * delay, LAST_RETRY)
        if committed is None:
            return
        self._trouble.over()
        seconds = time.monotonic() - started
        for data in shipment.payloads.values():
            if isinstance(data, Path):
                data.unlink(missing_ok=True)  # an anchor's files are as large as the model, and may lie in memory
        self._settle(committed)
        wire_bytes, versions = committed.wire_bytes, captured.versions
        self._on_upload(UploadReport(committed.position, captured.parent, versions, wire_bytes, seconds, attempts))

    def _wait_to_retry(self, error: DeltaWireError, delay: float) -> bool:
        """Wait after a failed try, `delay` seconds or until a flush; False when stopping."""
        with self._changed:
            self._problem, self._failures = error, self._failures + 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_stopping or self._hurry, delay)
            self._hurry = False
            return not self._is_stopping

    def _settle(self, committed: Committed) -> None:
        """The frozen version is durable: the next one names it as its parent."""
        with self._changed:
            self._queue, self._tip = self._queue.commit(), committed
            self._require_nothing_forgotten(self._queue, self._following)
            self._problem, self._hurry = None, False
            self._changed.notify_all()
