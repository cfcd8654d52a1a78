"""Who makes a captured version durable. One process does it alone; a rank of a sharded job does its part of it."""

from collections.abc import Callable
from typing import Protocol

import msgspec

from deltawire.buckets.base import Bucket
from deltawire.errors import DeltaWireError
from deltawire.publish import pending
from deltawire.publish.pending import Captured, Shipment
from deltawire.runlog import writing
from deltawire.runlog.invariants import parent_is, require
from deltawire.runlog.records import Position
from deltawire.runlog.signing import SigningKey
from deltawire.runlog.writing import Attempt

Stop = Callable[[], bool]
"""whether the publisher is closing, so that waiting must end"""


class Tip(msgspec.Struct, frozen=True):
    """A run's newest commit: where it stands, and the hash of its record, which the next commit names."""

    position: Position
    hash: str


class Committed(Tip, frozen=True):
    """A commit that is durable, with the bytes of its payloads."""

    wire_bytes: int


class Sender(Protocol):
    """Makes versions durable, one at a time and in order, on the uploader's thread."""

    def next_range(self, stop: Stop) -> int | None:
        """The version that the next commit must end at; None where any may, or when stopped. Raises RankFailed."""

    def send(self, captured: Captured, shipment: Shipment, tip: Tip | None, stop: Stop) -> Committed | None:
        """Make a version durable, as the commit after `tip`. After an error call again with the same arguments.

        None when stopped. Raises BucketError, ChainError, and in a sharded job RankFailed and what stops other ranks.
        """

    def report_trouble(self, error: DeltaWireError) -> None:
        """Tell the job's other ranks what stopped the last try."""

    def close(self, timeout: float) -> None:
        """Nothing more is sent; wait for the job's other ranks, at most `timeout` seconds."""


class SoloSender:
    """One process: it writes payloads and commits itself."""

    def __init__(self, bucket: Bucket, *, writer: str, key: SigningKey | None) -> None:
        self._bucket, self._writer, self._key = bucket, writer, key

    def next_range(self, stop: Stop) -> int | None:
        """Any version may be the next."""
        return None

    def send(self, captured: Captured, shipment: Shipment, tip: Tip | None, stop: Stop) -> Committed | None:
        """Write the payloads, then the commit. Raises BucketError, ChainError."""
        parent_hash = tip.hash if tip is not None else None
        attempt = pending.freeze(captured, [shipment], parent_hash=parent_hash, writer=self._writer, key=self._key)
        return commit(self._bucket, attempt, tip)

    def report_trouble(self, error: DeltaWireError) -> None:
        """One process has no other rank."""

    def close(self, timeout: float) -> None:
        """One process has no other rank to wait for."""


def commit(bucket: Bucket, attempt: Attempt, tip: Tip | None) -> Committed:
    """Append a version to the run, after its newest commit `tip`. Every commit that a publisher makes is made here.

    Raises BucketError, ChainError; BrokenInvariant for a commit whose parent is not `tip`.
    """
    position, hash_of_tip = (None, None) if tip is None else (tip.position, tip.hash)
    require(parent_is(attempt.commit, position, hash_of_tip), where=bucket.url)
    writing.append(bucket, attempt)
    return Committed(attempt.commit.position, attempt.hash, attempt.commit.wire_bytes)
