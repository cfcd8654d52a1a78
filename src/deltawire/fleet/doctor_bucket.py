"""The doctor's checks of a bucket: what this host may do there, its clock, and the run that it holds."""

import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from deltawire.buckets.base import Bucket, fenced
from deltawire.errors import (
    AccessRefused,
    BadSignature,
    BucketError,
    ChainError,
    DeltaWireError,
    FormatError,
    NotFound,
    error_text,
)
from deltawire.fleet.findings import Finding, fault, note, ok
from deltawire.read.subscriber import Subscriber
from deltawire.runlog import log
from deltawire.runlog.keys import HEAD_KEY
from deltawire.runlog.records import Commit, Head
from deltawire.runlog.signing import Trust, trust

SKEW = 30.0
"""seconds that two clocks may differ: ages and the time from publish to served are off by as much"""
FOLDER = "doctor"
"""where in the bucket the doctor writes its object, and removes it"""


def rights(bucket: Bucket, *, read_only: bool, clock: Callable[[], float] = time.time) -> Iterator[Finding]:
    """Whether this host may read, write and delete, whether conditional writes are kept, and how far clocks differ."""
    try:
        bucket.stat(HEAD_KEY)
        yield ok("read", f"{bucket.url} can be read")
    except NotFound:
        try:
            next(bucket.list(), None)
        except BucketError as error:  # to write would make a bucket of what may be a misspelt name
            yield fault("read", str(error), "check the address; the trainer makes a bucket at its first publish")
            return
        yield note("read", f"{bucket.url}: nothing is published yet", "start the trainer, or check the address")
    except BucketError as error:
        yield fault("read", str(error), _credentials(error, "read"))
        return
    if read_only:
        yield note("write", "not tried: this host only follows, and then keeps no heartbeat")
        return
    key = f"{FOLDER}/{secrets.token_hex(8)}"
    before = clock()
    try:
        bucket.put(key, b"deltawire doctor")
    except BucketError as error:
        fix = f"{_credentials(error, 'write')}; a host that only follows says --read-only"
        yield fault("write", str(error), fix)
        return
    yield ok("write", "objects can be written")
    yield from _clock(bucket, key, before, clock)
    yield from _conditional(bucket)
    yield _delete(bucket, key)


def _clock(bucket: Bucket, key: str, before: float, clock: Callable[[], float]) -> Iterator[Finding]:
    try:
        stamp = bucket.stat(key).modified
    except BucketError as error:
        yield fault("clock", f"what was written cannot be looked at: {error}", "try again; the store may be ill")
        return
    after = clock()
    off = stamp - after if stamp > after else min(0.0, stamp - before)
    if abs(off) > SKEW:
        ahead = "ahead of" if off > 0 else "behind"
        fix = "set this host's clock by NTP (timedatectl set-ntp true)"
        yield fault("clock", f"the store's clock is {abs(off):.0f} s {ahead} this host's", fix)
    else:
        yield ok("clock", "this host's clock and the store's agree")


def _conditional(bucket: Bucket) -> Iterator[Finding]:
    one_writer = "let one trainer alone publish to a bucket"
    try:
        kept, claimed = fenced(bucket, FOLDER), bucket.conditional_writes
    except BucketError as error:
        yield fault("conditional writes", f"they cannot be proved: {error}", one_writer)
        return
    if kept:
        yield ok("conditional writes", "proved: a second trainer is refused at its first commit")
    elif claimed or getattr(bucket, "prove", None) is not None:
        said = "this store ignores If-None-Match: two trainers may both believe that they committed"
        yield fault("conditional writes", said, f"{one_writer}, or use a store that keeps If-None-Match")
    else:
        yield note(
            "conditional writes", "this store has none; a second trainer is refused at its next commit", one_writer
        )


def _delete(bucket: Bucket, key: str) -> Finding:
    try:
        bucket.delete(key)
        bucket.stat(key)
    except NotFound:
        return ok("delete", "objects can be deleted")
    except BucketError as error:
        return fault("delete", f"{error}; {key} stays", _credentials(error, "delete") + ": `prune` needs it")
    return fault("delete", f"{key} is still there after it was deleted", "look for versioning or a lock on the bucket")


def _credentials(error: BucketError, right: str) -> str:
    if isinstance(error, AccessRefused):
        return f"give this host credentials with the right to {right} (docs/STORES.md)"
    return "check the address, the network and the store's own status"


def records(
    bucket: Bucket, *, run: str | None, trusted: Iterable[str | Path], clock: Callable[[], float] = time.time
) -> Iterator[Finding]:
    """Whether HEAD is where the run is, the run is the one meant, and who signed it."""
    known = trust(trusted)
    try:
        with Subscriber(bucket, trusted=known) as subscriber:
            newest = subscriber.recent(1)[0]
            signer, compactors = subscriber.run.signer, subscriber.run.compactors
        head = log.hinted(bucket)
    except NotFound:
        return  # said under "read"
    except BadSignature as error:
        yield fault("signatures", str(error), "give --trust the key that the trainer's `deltawire keygen` printed")
        return
    except DeltaWireError as error:
        yield fault("run", error_text(error), f"run `deltawire verify {bucket.url}`")
        return
    yield _head(bucket, head, newest)
    yield _run(bucket, newest, run, known)
    yield _signatures(signer, len(compactors), bool(known))
    if (ahead := newest.created - clock()) > SKEW:
        said = f"version {newest.version} was committed {ahead:.0f} s in the future, by the trainer's clock"
        yield fault("trainer's clock", said, "set the clock of the trainer's host, or of this one, by NTP")


def _head(bucket: Bucket, head: Head | None, newest: Commit) -> Finding:
    mends = "the trainer's next commit mends it; followers find the newest commit by a listing until then"
    if head is None:
        return fault("head", f"{bucket.url}/{HEAD_KEY} is missing or damaged", mends)
    if head.version < newest.version:
        said = f"{HEAD_KEY} names version {head.version}, and version {newest.version} is committed"
        return fault("head", f"{said}: its writer was stopped between the two", mends)
    return ok("head", f"{HEAD_KEY} names version {head.version} of run {head.run}, the newest")


def _run(bucket: Bucket, newest: Commit, meant: str | None, known: Trust) -> Finding:
    if meant is None or newest.run == meant:
        return ok("run", f"the bucket is at run {newest.run}")
    continues = False
    with suppress(BucketError, FormatError, ChainError):  # then it is not shown to
        continues = log.continues(bucket, newest.run, meant, trust=known)
    if continues:
        return ok("run", f"the bucket is at run {newest.run}, which continues {meant}")
    said = f"the bucket is at run {newest.run}, which does not continue {meant}: somebody began another there"
    return fault("run", said, f"give that trainer a bucket of its own, or follow it with --run {newest.run}")


def _signatures(signer: str | None, compactors: int, trusting: bool) -> Finding:
    if signer is None:
        fix = "make a key with `deltawire keygen`, publish with signing_key=, follow with --trust"
        return note("signatures", "the run is not signed: anyone who may write the bucket decides what is served", fix)
    if not trusting:
        return note("signatures", f"the run is signed by {signer}, and nobody asks for it", f"add --trust {signer}")
    return ok("signatures", f"signed by {signer}, which is trusted, with {compactors} compactors")
