"""Heartbeats that a relay passes on: who follows the bucket nearby is seen in the bucket that the relay reads."""

import time
from collections.abc import Callable
from contextlib import suppress

import msgspec

from deltawire.buckets.base import Bucket, Stat
from deltawire.errors import AccessRefused, Unavailable
from deltawire.runlog import heartbeats
from deltawire.runlog.heartbeats import UNSAID, Heartbeat
from deltawire.runlog.pace import FLOOR, PER_REPLICA

MOST = 500
"""replicas whose heartbeats are passed on"""


class PassedOn:
    """Writes the heartbeats of `target` to `source`, each when it changed, and at most every 30 seconds; less often in
    a large fleet, as followers do. They say of themselves what they said, but for how soon the next one comes. Those of
    silent replicas stay: a relay that was started again would write them as if they had just come.

    `clock` gives seconds of any kind, and `now` those since the epoch."""

    def __init__(
        self,
        source: Bucket,
        target: Bucket,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._source, self._target, self._clock, self._now = source, target, clock, now
        self._known: list[tuple[Stat, Heartbeat]] = []
        self._written: dict[str, tuple[str, float]] = {}
        self._may_write = True

    def step(self) -> int:
        """Pass on what is due; how many. A store that says "later" is asked again at the next step.

        Raises AccessRefused, once, where the relay may only read `source`; BucketError, TooLarge where `target` cannot
        be read."""
        if not self._may_write:
            return 0
        self._known = heartbeats.read_all(self._target, self._known)
        floor, passed, now = max(FLOOR, PER_REPLICA * len(self._known)), 0, self._now()
        heard = [(stat, beat) for stat, beat in self._known if not heartbeats.is_silent(stat, beat, now)]
        with suppress(Unavailable):
            for stat, beat in heard[:MOST]:
                tag, when = self._written.get(stat.key, ("", -floor))
                if tag == stat.tag or self._clock() < when + floor:
                    continue
                self._pass(beat, 2 * floor)
                self._written[stat.key] = stat.tag, self._clock()
                passed += 1
        return passed

    def _pass(self, beat: Heartbeat, every: float) -> None:
        try:
            heartbeats.beat(self._source, msgspec.structs.replace(beat, every=max(beat.every or UNSAID, every)))
        except AccessRefused as error:
            self._may_write = False
            raise AccessRefused(f"{error}; `status` there will not show who follows {self._target.url}") from None
