"""What a prune under way deletes, for those who name a version meanwhile: docs/FORMAT.md §8 specifies it.

A prune writes this first, then looks at the tags again, then deletes. Who tags writes the tag first, then looks at
this. So at least one of the two sees the other, and a tag never names a version that goes.
"""

import time
from collections.abc import Callable
from contextlib import suppress

import msgspec

from deltawire.buckets.base import Bucket
from deltawire.errors import NotFound, TooLarge
from deltawire.runlog.keys import pruning_key

MAX_PRUNING = 1 << 20
"""bytes"""
Span = tuple[int, int]
"""the first and the last of versions that stay, from an anchor on"""


class Pruning(msgspec.Struct, frozen=True):
    """Every version of `run` below `floor` goes, but for those within `kept`. `at` is when it was written."""

    run: str
    floor: int
    kept: tuple[Span, ...] = ()
    at: float = 0.0
    format: int = 1

    def takes(self, version: int) -> bool:
        """Whether a version goes."""
        return version < self.floor and not any(first <= version <= last for first, last in self.kept)


def announce(
    bucket: Bucket, run: str, floor: int, kept: tuple[Span, ...], *, clock: Callable[[], float] = time.time
) -> None:
    """Say what goes. Raises BucketError."""
    bucket.put(pruning_key(run), msgspec.json.encode(Pruning(run, floor, kept, clock())))


def announced(bucket: Bucket, run: str) -> Pruning | None:
    """What a prune under way, or one that was interrupted, lets go; None where there is none. Raises BucketError."""
    with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError, NotFound, TooLarge):
        found = msgspec.json.decode(bucket.get(pruning_key(run), limit=MAX_PRUNING), type=Pruning)
        return found if found.run == run and found.format == 1 else None
    return None


def done(bucket: Bucket, run: str) -> None:
    """Say that all of it is gone. Raises BucketError."""
    bucket.delete(pruning_key(run))
