"""Whether all who follow a run read codec `class`, by their heartbeats. Those are hints, so they may only veto."""

import logging
import time
from collections.abc import Callable

from deltawire.buckets.base import Bucket, Stat
from deltawire.errors import BucketError, FormatError, NotFound, some
from deltawire.runlog import heartbeats
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
        self.look()

    def read_class(self) -> bool:
        """Whether a version may be of codec `class`. One without heartbeats, as of a bucket that nobody follows yet, is
        no veto; neither is a silent one."""
        return self._reason is None

    def look(self) -> None:
        """Read the heartbeats that changed. What becomes of the codec is said in the log, once."""
        if not self._asked:
            return
        try:
            self._known = heartbeats.read_all(self._bucket, self._known)
            reason = self._why_not()
        except NotFound:  # nobody wrote any
            reason = None
        except (BucketError, FormatError) as error:
            reason = f"their heartbeats cannot be read ({error})"
        if reason is not None and reason != self._reason:
            LOG.warning("%s: versions are of codec subset until all replicas read class: %s", self._bucket.url, reason)
        elif reason is None and self._reason is not None:
            LOG.info("%s: versions are of codec class", self._bucket.url)
        self._reason = reason

    def _why_not(self) -> str | None:
        now = self._clock()
        fresh = [beat for stat, beat in self._known if not heartbeats.is_silent(stat, beat, now)]
        others = [beat.replica for beat in fresh if "class" not in beat.codecs]
        return f"{len(others)} do not: {some(others)}" if others else None
