"""Whether all who follow a run read codec `class`, and by which tiles. Heartbeats are hints, so they may only veto."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from deltawire.buckets.base import Bucket, Stat
from deltawire.errors import BucketError, FormatError, NotFound, some
from deltawire.runlog import cuts, heartbeats
from deltawire.runlog.cuts import Cuts
from deltawire.runlog.heartbeats import Heartbeat

LOG = logging.getLogger("deltawire")


@dataclass(frozen=True, slots=True)
class Heard:
    """What the replicas that were heard lately say. `cuts` are where tiles of codec `class` must end, so that all can
    read them. They are None where one cannot, and then there is a `reason`."""

    replicas: int
    cuts: Cuts | None
    reason: str | None = None


class Receivers:
    """The replicas of a bucket, as they were `heard` at the last `look`, which never raises; the first is when this is
    made. While the store does not show them, they are taken for readers of the other codecs alone. Where `asked` is
    False nobody wants to know, and the store is left alone.

    A bucket without heartbeats, which nobody follows yet, is no veto; neither is a silent replica.
    """

    def __init__(self, bucket: Bucket, *, asked: bool, clock: Callable[[], float] = time.time) -> None:
        self._bucket, self._asked, self._clock = bucket, asked, clock
        self._known: list[tuple[Stat, Heartbeat]] = []
        self.heard = Heard(0, None, "class was not asked for")
        self.look()

    def look(self) -> None:
        """Read the heartbeats that changed. What becomes of the codec is said in the log, once."""
        if not self._asked:
            return
        try:
            self._known = heartbeats.read_all(self._bucket, self._known)
            heard = self._hear()
        except NotFound:  # nobody wrote any
            heard = Heard(0, {})
        except (BucketError, FormatError) as error:
            heard = Heard(0, None, f"heartbeats cannot be read ({error})")
        if heard.cuts is None and heard.reason != self.heard.reason:
            LOG.warning(
                "%s: versions are of codec subset until all replicas read class: %s", self._bucket.url, heard.reason
            )
        elif heard.cuts is not None and self.heard.cuts is None:
            LOG.info("%s: versions may be of codec class", self._bucket.url)
        self.heard = heard

    def _hear(self) -> Heard:
        now = self._clock()
        fresh = [beat for stat, beat in self._known if not heartbeats.is_silent(stat, beat, now)]
        read = {beat.replica: heartbeats.reads_class(beat) for beat in fresh}
        others = [replica for replica, found in read.items() if found is None]
        if others:
            return Heard(len(fresh), None, f"{len(others)} do not read class: {some(others)}")
        return Heard(len(fresh), cuts.merged(found for found in read.values() if found is not None))
