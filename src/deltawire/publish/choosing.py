"""Which codec a version is encoded in: one that all replicas read, and under `auto` the one that is served soonest.

Until a version is served takes its publish, its bytes over the link twice (from the trainer and to a server), and its
decoding. What a trainer measures is the first and, by its uploads, the link. All times are those of the last versions,
so each codec is tried now and then. Where much changes and the link is fast, tensors as they are come sooner than any
list of changes.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deltawire.buckets.base import Bucket
from deltawire.format.body import DENSE_TRY_FROM
from deltawire.publish.choice import Choice
from deltawire.publish.receivers import Receivers
from deltawire.publish.reports import PublishReport, UploadReport
from deltawire.publish.requirements import LISTED
from deltawire.publish.sharded.ranks import is_first

CODECS = ("class", "subset")
"""between which `auto` chooses; the first needs fewer bytes and more time"""
WHOLE = "whole"
"""tensors as they are, in a file of `subset`: most bytes and least time"""
DECODED = {"class": 1.7, "subset": 1.2, WHOLE: 1.0}
"""seconds of decoding a version on a server for each of publishing it (docs/PERFORMANCE.md)"""
TRIES = 2
"""versions that are measured of each codec first; the first is slower, for loops are compiled"""
AGAIN = 64
"""versions after which the other codec is tried again"""
KEPT = 4
"""versions of a codec that are remembered: the fastest counts, for other work makes them slower"""
UPLOADS = 8
"""uploads that are remembered: the fastest tells the link, for a small one is all round trips"""


@dataclass(frozen=True, slots=True)
class Measured:
    """One version: seconds of publishing an element of the model, and bytes of its file a change."""

    seconds: float
    bytes: float


@dataclass(frozen=True, slots=True)
class Size:
    """A model's elements and bytes, and how many elements the last version changed."""

    elements: int
    changed: int
    nbytes: int = 0

    @property
    def is_dense(self) -> bool:
        """Whether so much changed that whole tensors may be sooner there."""
        return self.changed >= DENSE_TRY_FROM * max(self.elements, 1)


def until_served(size: Size, codec: str, versions: list[Measured], rate: float) -> float:
    """Seconds from a trainer's weights to a server's at `rate` bytes per second, in a codec that these versions had."""
    encode = size.elements * min(version.seconds for version in versions)
    return encode * (1 + DECODED[codec]) + 2 * size.changed * versions[-1].bytes / rate


class Chooser:
    """Chooses for a publisher that was asked for `codec`, by what `receivers` say and by its reports so far. One that
    holds tensors whole may send them `whole`."""

    def __init__(self, receivers: Receivers, codec: str, *, whole: bool = False) -> None:
        self._receivers, self._codec, self._may_be_whole = receivers, codec, whole
        self._measured = {way: deque[Measured](maxlen=KEPT) for way in (*CODECS, WHOLE)}
        self._way = "subset"
        self._rates = deque[float](maxlen=UPLOADS)
        self._size = Size(0, 0)
        self._since = 0

    def look(self) -> None:
        """See what the replicas say by now."""
        self._receivers.look()

    def hear(self, on_publish: Callable[[PublishReport], None]) -> Callable[[PublishReport], None]:
        """`on_publish`, whose reports tell what a codec takes."""

        def heard(report: PublishReport) -> None:
            is_delta = report.version and report.changed and report.is_encoded  # version 0 is none
            if is_delta and report.codec in CODECS:
                self._size = Size(report.total, report.changed, report.model_bytes)
                measured = Measured(report.seconds / report.total, report.wire_bytes / report.changed)
                self._measured[self._way].append(measured)  # of class, what it comes to where few tensors may be of it
                self._since += 1
            on_publish(report)

        return heard

    def hear_upload(self, on_upload: Callable[[UploadReport], None]) -> Callable[[UploadReport], None]:
        """`on_upload`, whose reports tell how fast the link is. On the uploader's thread."""

        def heard(report: UploadReport) -> None:
            if report.wire_bytes and report.attempts == 1:
                self._rates.append(report.wire_bytes / max(report.seconds, 1e-6))
            on_upload(report)

        return heard

    def choose(self) -> Choice:
        """What a version that is captured now is encoded in, and why."""
        choice = self._best()
        self._way = WHOLE if choice.whole else "class" if choice.by_class else "subset"
        return choice

    def _best(self) -> Choice:
        heard = self._receivers.heard
        if self._codec == "auto" and (reason := self._whole()) is not None:
            return Choice(whole=True, reason=reason)
        if heard.cuts is None:
            return self._only_subset(heard.reason or "")
        if self._codec == "class":
            return Choice(by_class=True, cuts=heard.cuts, reason="asked for, and every replica reads it")
        if not heard.replicas:
            return self._only_subset("no replica says that it reads class")
        codec, reason = self._served_sooner()
        return Choice(by_class=codec == "class", cuts=heard.cuts, reason=reason)

    def _only_subset(self, reason: str) -> Choice:
        """The one codec that is left; a version of it measures it again."""
        self._since %= AGAIN
        return Choice(reason=reason)

    def _whole(self) -> str | None:
        """Why whole tensors are served sooner than sparse ones, by what was measured; None where they are not. They are
        tried only where their bytes alone take less than a sparse version did, and that is measured now and then."""
        rates = [*self._rates]
        sparse = [codec for codec in CODECS if self._measured[codec]]
        is_known = rates and len(self._measured["subset"]) >= TRIES
        if not (self._may_be_whole and self._size.is_dense and is_known) or self._since >= AGAIN:
            return None
        rate, size = max(rates), self._size
        best, seconds = min(
            ((codec, until_served(size, codec, [*self._measured[codec]], rate)) for codec in sparse),
            key=lambda found: found[1],
        )
        if len(self._measured[WHOLE]) >= TRIES:
            whole = until_served(size, WHOLE, [*self._measured[WHOLE]], rate)
        else:
            whole = 2 * size.nbytes / rate
        if whole >= seconds:
            return None
        return f"whole tensors: until served {whole:.2g} s and {best} {seconds:.2g} s, at {rate / 1e6:.2g} MB/s"

    def _served_sooner(self) -> tuple[str, str]:
        """The codec that is served sooner, and why."""
        rates = [*self._rates]  # another thread may add to them meanwhile
        if not rates:
            return "class", "it takes fewer bytes, and no upload was measured yet"
        for codec in CODECS:
            if len(self._measured[codec]) < TRIES:
                return codec, "to measure it"
        rate = max(rates)
        seconds = {codec: until_served(self._size, codec, [*self._measured[codec]], rate) for codec in CODECS}
        best, other = sorted(CODECS, key=seconds.__getitem__)
        if self._since >= AGAIN:
            self._since = 0
            return other, "to measure it again"
        took = " and ".join(f"{codec} {seconds[codec]:.2g} s" for codec in (best, other))
        return best, f"until served {took}, at {rate / 1e6:.2g} MB/s"


def chooser_of(bucket: Bucket, codec: str, process_group: Any, clock: Callable[[], float]) -> Chooser:
    """What chooses in a process that publishes to a bucket, alone or in a group. Of a group rank 0 hears the
    replicas, and no rank sends tensors whole."""
    asked = "class" in LISTED[codec] and is_first(process_group)
    return Chooser(Receivers(bucket, asked=asked, clock=clock), codec, whole=process_group is None)
