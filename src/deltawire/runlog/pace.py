"""How often one of a fleet writes its heartbeat and looks at the bucket: together they stay within a store's limits."""

import time
from collections.abc import Callable
from contextlib import suppress

from deltawire.buckets.base import Bucket
from deltawire.errors import BucketError, Unavailable
from deltawire.runlog.keys import REPLICAS

FLOOR = 30.0
"""seconds between two heartbeats of one writer, on a store that counts calls"""
PER_REPLICA = 1.2
"""seconds that each replica adds to that: heartbeats take a quarter of the Hub's 1,000 calls in 5 minutes"""
PER_POLLER = 1.8
"""seconds that each replica adds between two looks at a Hub bucket: looks, of three calls, take half of those"""
COUNTED, LIMITED = 1.0, 5.0
"""`poll_seconds` from which a store bills calls, and from which it limits them"""
SLOWEST = 8
"""times longer that one waits at most after the store said "later" (HTTP 429, 503) again and again"""


class Pace:
    """When one writer of heartbeats may write again.

    A store that bills or limits calls gets news at most every `FLOOR` seconds, and the same again after four times
    that. Both are longer in a large fleet, and double each time the store says "later". In a folder news is written at
    once.
    """

    def __init__(self, poll_seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._poll, self._clock = poll_seconds, clock
        self._fleet, self._slower = 1, 1
        self._tried: float | None = None
        self._writes = 0

    @property
    def floor(self) -> float:
        """Seconds between two writes."""
        return max(FLOOR, PER_REPLICA * self._fleet) * self._slower if self._poll >= COUNTED else 0.0

    @property
    def every(self) -> float:
        """Seconds after which the same is written again."""
        return 4 * self.floor or FLOOR

    def poll(self, seconds: float) -> float:
        """Seconds between looks at the bucket, where one follower alone would take `seconds`."""
        return max(seconds, PER_POLLER * self._fleet) * self._slower if self._poll >= LIMITED else seconds

    def is_due(self, *, news: bool) -> bool:
        """Whether to write now; `news` is whether anything changed since the last time."""
        return self._tried is None or self._clock() >= self._tried + (self.floor if news else self.every)

    def wrote(self, bucket: Bucket) -> None:
        """A heartbeat was written. Every tenth time the fleet is counted, by one listing."""
        self._tried = self._clock()
        self.answered()
        if self._poll >= COUNTED and self._writes % 10 == 0:
            with suppress(BucketError):
                self._fleet = max(1, sum(1 for _ in bucket.list(REPLICAS)))
        self._writes += 1

    def refused(self, error: BucketError) -> None:
        """A heartbeat was not written."""
        self._tried = self._clock()
        self.failed(error)

    def failed(self, error: Exception) -> None:
        """Where the store said "later", ask half as often."""
        if isinstance(error, Unavailable):
            self._slower = min(SLOWEST, 2 * self._slower)

    def answered(self) -> None:
        """The store answers: ask twice as often again, up to the usual."""
        self._slower = max(1, self._slower // 2)
