"""The fleet's heartbeats: what each replica serves and still needs, and what the trainer holds back."""

from collections.abc import Iterable
from contextlib import suppress
from typing import Annotated

import msgspec

from deltawire.buckets.base import Bucket, Stat
from deltawire.errors import NotFound, TooLarge
from deltawire.runlog.cuts import Cuts
from deltawire.runlog.keys import REPLICAS, replica_key, trainer_key

MAX_HEARTBEAT = 64 << 10
"""bytes"""
LOOKS = 3
"""times a heartbeat is read before it counts as none"""
MAX_REPLICAS = 10_000
"""heartbeats that are read; beyond, somebody writes them who is no replica"""
MISSED = 3
"""heartbeats that a replica may miss before it counts as silent"""
UNSAID = 30.0
"""seconds after which an older deltawire, which does not say so, writes its heartbeat again"""


Count = Annotated[int, msgspec.Meta(ge=0)]
"""a version, a number of versions or of bytes: a record with another number in its place is none"""


class Heartbeat(msgspec.Struct, frozen=True):
    """What one replica says of itself. It is a hint: anyone who may write the bucket may write it.

    `version` is what it serves, `staged` what is ready to be written, and `lag` how many versions it is behind. `audit`
    is what the last look at all of its memory found. `need` is the lowest version that it still reads from, written
    before a joiner downloads. `at` is when it was written, in seconds since the epoch by the replica's clock, and
    `every` after how many seconds the next one comes at the latest.

    `pause_p50_ms` and `pause_p99_ms` are over its last hundred updates, `wire_bytes` of the last one, `fetched_bytes`
    of all since the follower began. `codecs` are those that it reads, and where there are none it reads all but
    `class`. Where that is not among them and there are `cuts`, it reads `class`, too, by tiles that end where its parts
    of tensors do (`runlog.cuts`). `unready` says why no request should be sent.
    """

    replica: str
    run: str | None = None
    version: Count | None = None
    root: str | None = None
    need: Count | None = None
    staged: Count | None = None
    lag: Count | None = None
    audit: str | None = None
    error: str | None = None
    at: float | None = None
    every: float | None = None
    pause_p50_ms: float | None = None
    pause_p99_ms: float | None = None
    wire_bytes: Count | None = None
    fetched_bytes: Count | None = None
    codecs: tuple[str, ...] = ()
    cuts: dict[str, tuple[Count, Count]] | None = None
    unready: str | None = None
    format: int = 1


class TrainerBeat(msgspec.Struct, frozen=True):
    """What the trainer of a run says of itself beside its commits; a hint as heartbeats are.

    `version` is the newest that it captured, `committed` the newest in the bucket; `waiting` versions of
    `waiting_bytes` in memory lie between. `problem` is the last upload error, None while all is well. `ended` means
    that the trainer closed the run.
    """

    run: str
    version: Count | None = None
    committed: Count | None = None
    waiting: Count = 0
    waiting_bytes: Count = 0
    problem: str | None = None
    ended: bool = False
    at: float | None = None
    every: float | None = None
    format: int = 1


def reads_class(heartbeat: Heartbeat) -> Cuts | None:
    """Where tiles must end for a replica that reads codec `class`; None for one that does not."""
    return {} if "class" in heartbeat.codecs else heartbeat.cuts


def beat(bucket: Bucket, heartbeat: Heartbeat) -> None:
    """Write a replica's record. Raises BucketError: AccessRefused where this host may only read."""
    bucket.put(replica_key(heartbeat.replica), msgspec.json.encode(heartbeat))


def read_trainer(bucket: Bucket, run: str) -> TrainerBeat | None:
    """What a run's trainer said of itself last; None where there is none, or it cannot be read. Raises BucketError."""
    with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError, NotFound, TooLarge):
        beat = msgspec.json.decode(bucket.get(trainer_key(run), limit=MAX_HEARTBEAT), type=TrainerBeat)
        return beat if beat.run == run else None
    return None


def read_all(bucket: Bucket, known: Iterable[tuple[Stat, Heartbeat]] = ()) -> list[tuple[Stat, Heartbeat]]:
    """Every replica's newest record, by name; a record of another replica than its key's is left out. Of `known`, an
    earlier answer, only what changed since is fetched. Raises TooLarge where more than MAX_REPLICAS lie there."""
    held = {(stat.key, stat.tag): heartbeat for stat, heartbeat in known}
    found: list[tuple[Stat, Heartbeat]] = []
    for stat in bucket.list(REPLICAS):
        if len(found) >= MAX_REPLICAS:
            raise TooLarge(
                f"{bucket.url}/{REPLICAS} holds more than {MAX_REPLICAS:,} heartbeats; remove those of no replica"
            )
        heartbeat = held.get((stat.key, stat.tag)) or _read(bucket, stat.key)
        if heartbeat is not None:
            found.append((stat, heartbeat))
    return found


def heard(stat: Stat, heartbeat: Heartbeat, now: float) -> float:
    """Seconds since a replica said something, by the store's stamp or by its own clock: one of the two may be wrong."""
    return max(0.0, min((now - stamp for stamp in (stat.modified, heartbeat.at) if stamp), default=0.0))


def is_silent(stat: Stat, heartbeat: Heartbeat, now: float) -> bool:
    """Whether a replica missed too many heartbeats to count."""
    return heard(stat, heartbeat, now) > MISSED * (heartbeat.every or UNSAID)


def _read(bucket: Bucket, key: str) -> Heartbeat | None:
    """The record of a key's replica; None for other objects. One that cannot be read is read again: it may have been
    damaged on its way, and a prune deletes what no heartbeat asks for."""
    for _ in range(LOOKS):
        try:
            heartbeat = msgspec.json.decode(bucket.get(key, limit=MAX_HEARTBEAT), type=Heartbeat)
        except (NotFound, TooLarge):
            return None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
        if key == f"{REPLICAS}{heartbeat.replica}.json":
            return heartbeat
    return None
