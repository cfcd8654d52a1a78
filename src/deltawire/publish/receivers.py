"""Whether all who follow a run read codec `class`, and by which tiles. Heartbeats are hints, so they may only veto."""

import logging
import time
from collections.abc import Callable

from deltawire.buckets.base import Bucket, Stat
from deltawire.errors import BucketError, FormatError, NotFound, some
from deltawire.publish.choice import SUBSET, Choice
from deltawire.runlog import cuts, heartbeats
from deltawire.runlog.cuts import Cuts
from deltawire.runlog.heartbeats import Heartbeat

LOG = logging.getLogger("deltawire")


class Receivers:
    """The replicas of a bucket, as they were seen at the last `look`, which never raises; the first is when this is
    made. While the store does not show them, they are taken for readers of the other codecs alone. Where `asked` is
    False nobody wants to know, and the store is left alone."""

    def __init__(self, bucket: Bucket, *, asked: bool, clock: Callable[[], float] = time.time) -> None:
        self._bucket, self._asked, self._clock = bucket, asked, clock
        self._known: list[tuple[Stat, Heartbeat]] = []
        self._reason: str | None = ""
        self._cuts: Cuts | None = None
        self.look()

    def cuts(self) -> Cuts | None:
        """Where tiles of codec `class` must end, so that all can read them; None where one cannot. A bucket without
        heartbeats, which nobody follows yet, is no veto; neither is a silent replica."""
        return self._cuts

    def choice(self) -> Choice:
        """What a version that is captured now is encoded in."""
        found = self.cuts()
        return SUBSET if found is None else Choice(by_class=True, cuts=found)

    def look(self) -> None:
        """Read the heartbeats that changed. What becomes of the codec is said in the log, once."""
        if not self._asked:
            return
        reason: str | None = None
        found: Cuts = {}
        try:
            self._known = heartbeats.read_all(self._bucket, self._known)
            reason, found = self._ask()
        except NotFound:  # nobody wrote any
            pass
        except (BucketError, FormatError) as error:
            reason = f"their heartbeats cannot be read ({error})"
        if reason is not None and reason != self._reason:
            LOG.warning("%s: versions are of codec subset until all replicas read class: %s", self._bucket.url, reason)
        elif reason is None and self._reason is not None:
            LOG.info("%s: versions are of codec class", self._bucket.url)
        self._reason, self._cuts = reason, None if reason is not None else found

    def _ask(self) -> tuple[str | None, Cuts]:
        """Why not, if so, and what suits those that do."""
        now = self._clock()
        fresh = [beat for stat, beat in self._known if not heartbeats.is_silent(stat, beat, now)]
        read = {beat.replica: heartbeats.reads_class(beat) for beat in fresh}
        others = [replica for replica, found in read.items() if found is None]
        reason = f"{len(others)} do not: {some(others)}" if others else None
        return reason, cuts.merged(found for found in read.values() if found is not None)
