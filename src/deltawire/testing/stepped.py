"""A publisher without a thread: the parts of `Publisher`, whose uploads happen when a caller says so."""

import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from deltawire.buckets.base import Bucket
from deltawire.buckets.wrappers import Typed
from deltawire.publish import pending
from deltawire.publish.capture import WholeCapturer
from deltawire.publish.capturer import CaptureOptions
from deltawire.publish.choice import Choice
from deltawire.publish.invariants import changes_add_up, digests_agree, nothing_is_forgotten
from deltawire.publish.pending import Shipment
from deltawire.publish.queue import Queue
from deltawire.publish.requirements import LISTED
from deltawire.publish.sender import SoloSender
from deltawire.runlog.invariants import Problem
from deltawire.runlog.records import Position
from deltawire.weights.bits import Bits
from deltawire.weights.delta import Delta


class SteppedPublisher:
    """Captures with `publish`, and makes one try at what waits with each `upload`. Commits say that `writer` wrote
    them; `new_run_id` gives the id of a run that begins. `codec` is as a Publisher's."""

    def __init__(
        self,
        bucket: Bucket,
        *,
        clock: Callable[[], float],
        new_run_id: Callable[[], str],
        supersede: bool = False,
        writer: str = "stepped",
        codec: str = "gap",
    ) -> None:
        options = CaptureOptions(
            None,
            "BF16",
            None,
            clock,
            supersede=supersede,
            new_run_id=new_run_id,
            codecs=LISTED[codec],
            choose=lambda: Choice(codec == "class"),
        )
        self._spool = Path(tempfile.mkdtemp(prefix="deltawire-"))
        try:
            self._capturer = WholeCapturer(bucket, self._spool, options)
        except BaseException:
            self.kill()
            raise
        self._sender = SoloSender(Typed(bucket), writer=writer, key=None)
        self._queue, self._tip = Queue(), self._capturer.resumed
        self._shipment: Shipment | None = None

    @property
    def position(self) -> Position | None:
        """The newest committed position."""
        return None if self._tip is None else self._tip.position

    def publish(self, pairs: Iterable[tuple[str, Bits]]) -> None:
        """Capture the weights, and queue the change."""
        capture = self._capturer.capture(pairs, step=None, metrics=None, cut=self._queue.cut)
        for captured in capture.versions:
            self._queue = self._queue.add(captured)
        self._capturer.transition.end()

    def upload(self) -> bool:
        """One try to make the oldest of what waits durable; whether there was anything. After what it raises the change
        waits for the next try."""
        if self._queue.is_empty:
            return False
        if self._queue.frozen is None:
            self._queue = self._queue.freeze()
        assert self._queue.frozen is not None
        if self._shipment is None:
            self._shipment = pending.ship(self._queue.frozen)
        self._tip = self._sender.send(self._queue.frozen, self._shipment, self._tip, lambda: False)
        self._queue, self._shipment = self._queue.commit(), None
        return True

    def problem(self, committed: Mapping[str, Bits] | None) -> Problem:
        """What of a publisher's invariants does not hold; None where all do. `committed` are the weights of its newest
        committed position, or None before there is one."""
        at, held = None if self.position is None else self.position.version, self._queue.held
        problem = nothing_is_forgotten(at, held, self._capturer.next_version)
        tracker = self._capturer.tracker
        if problem is not None or committed is None or self._capturer.transition.unfinished:
            return problem
        uncovered, baseline = Delta(tracker.uncovered), tracker.baseline.as_mapping()
        if not uncovered:
            problem = digests_agree(held, tracker.baseline.digests)
        return problem or changes_add_up(committed, held, uncovered, baseline)

    def kill(self) -> None:
        """End as a killed process does: nothing more is sent."""
        shutil.rmtree(self._spool, ignore_errors=True)
