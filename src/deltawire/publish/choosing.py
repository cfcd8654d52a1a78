"""Which codec a version is encoded in: one that all replicas read, and under `auto` the one that is served soonest.

Until a version is served takes its encoding, its bytes over the link twice (from the trainer and to a server), and its
decoding. What a trainer measures is the first and, by its uploads, the link. All times are those of the last versions,
so each codec is tried now and then.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from deltawire.publish.choice import Choice
from deltawire.publish.receivers import Receivers
from deltawire.publish.reports import PublishReport, UploadReport

CODECS = ("class", "subset")
"""between which `auto` chooses; the first needs fewer bytes and more time"""
DECODED = {"class": 1.7, "subset": 1.2}
"""seconds of decoding a version on a server for each of comparing and encoding it (docs/PERFORMANCE.md)"""
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
    """One version: seconds of comparing and encoding an element of the model, and bytes of its file a change."""

    seconds: float
    bytes: float


@dataclass(frozen=True, slots=True)
class Size:
    """A model's elements, and how many of them the last version changed."""

    elements: int
    changed: int


def until_served(size: Size, codec: str, versions: list[Measured], rate: float) -> float:
    """Seconds from a trainer's weights to a server's at `rate` bytes per second, in a codec that these versions had."""
    encode = size.elements * min(version.seconds for version in versions)
    return encode * (1 + DECODED[codec]) + 2 * size.changed * versions[-1].bytes / rate


class Chooser:
    """Chooses for a publisher that was asked for `codec`, by what `receivers` say and by its reports so far."""

    def __init__(self, receivers: Receivers, codec: str) -> None:
        self._receivers, self._codec = receivers, codec
        self._measured = {codec: deque[Measured](maxlen=KEPT) for codec in CODECS}
        self._rates = deque[float](maxlen=UPLOADS)
        self._size = Size(0, 0)
        self._since = 0

    def hear(self, on_publish: Callable[[PublishReport], None]) -> Callable[[PublishReport], None]:
        """`on_publish`, whose reports tell what a codec takes."""

        def heard(report: PublishReport) -> None:
            if 0 < report.changed < report.total and report.is_encoded and report.codec in CODECS:
                self._size = Size(report.total, report.changed)
                measured = Measured(report.compare_seconds / report.total, report.wire_bytes / report.changed)
                self._measured[report.codec].append(measured)
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
        heard = self._receivers.heard
        if heard.cuts is None:
            return Choice(reason=heard.reason or "")
        if self._codec == "class":
            return Choice(by_class=True, cuts=heard.cuts, reason="asked for, and every replica reads it")
        if not heard.replicas:
            return Choice(reason="no replica says that it reads class")
        codec, reason = self._served_sooner()
        return Choice(by_class=codec == "class", cuts=heard.cuts, reason=reason)

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
