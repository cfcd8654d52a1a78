"""Runs that only a stranger would write: records that say what they like, in the places where readers look.

Records are encoded without our own checks, which would refuse them.
"""

import secrets
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from blake3 import blake3

from deltawire import digest
from deltawire.buckets import Bucket
from deltawire.runlog.keys import HEAD_KEY, commit_key, derived_key, run_key
from deltawire.runlog.records import BaseCheckpoint, Commit, Derived, Head, Payload, Run, hash_of
from deltawire.weights.bits import Bits
from deltawire.weights.digest import root
from deltawire.weights.table import TensorEntry

NOTHING = blake3(b"").hexdigest()


def encode(record: Any) -> bytes:
    """A record's JSON, whatever it says."""
    return msgspec.json.encode(record, order="sorted")


def begin(
    bucket: Bucket,
    table: Iterable[TensorEntry],
    *,
    base: BaseCheckpoint | None = None,
    payloads: Iterable[Payload] = (),
    files: Mapping[str, bytes] = {},
    weights: Mapping[str, Bits] | None = None,
) -> Commit:
    """A run of one version whose anchor is what `payloads` and `files` (contents by key below the run) say, or `base`.
    The digests are those of `weights`; without them they are zeros, as of all-zero bits."""
    table = tuple(table)
    run = Run(secrets.token_hex(8), table, 0.0, base)
    bucket.put(run_key(run.run), encode(run))
    for key, data in files.items():
        bucket.put(f"runs/{run.run}/{key}", data)
    known = digest(weights) if weights is not None else {entry.name: 0 for entry in table}
    named = [Payload(key, len(data), blake3(data).hexdigest()) for key, data in files.items()]
    commit = Commit(
        run=run.run,
        version=0,
        parent=None,
        root=root(table, known),
        digests={name: f"{value:016x}" for name, value in known.items()},
        payloads=(*payloads, *named),
        created=0.0,
        parent_hash=hash_of(encode(run)),
    )
    add(bucket, commit)
    return commit


def add(bucket: Bucket, commit: Commit) -> None:
    """A commit, and the HEAD that names it."""
    key = commit_key(commit.run, commit.version)
    bucket.put(key, encode(commit))
    bucket.put(HEAD_KEY, encode(Head(commit.run, commit.version, key)))


def continued(commit: Commit, **changes: Any) -> Commit:
    """The next version after a commit, which changes nothing unless `changes` say so."""
    facts: dict[str, Any] = {"version": commit.version + 1, "parent": commit.version, "digests": {}, "payloads": ()}
    return msgspec.structs.replace(commit, **facts | {"parent_hash": hash_of(encode(commit))} | changes)


def claim(key: str, size: int) -> Payload:
    """A payload that says it is of some size, whatever lies there."""
    return Payload(key, size, NOTHING)


def anchor_of(bucket: Bucket, commit: Commit, digests: Mapping[str, str], payloads: Iterable[Payload] = ()) -> str:
    """The record of an anchor at a commit, sound but for its payloads, which are what a stranger lists. Its key."""
    listed = tuple(payloads)
    record = Derived(
        run=commit.run,
        version=commit.version,
        parent=None,
        root=commit.root,
        digests=dict(digests),
        payloads=listed,
        commit_hash=hash_of(encode(commit)),
    )
    key = derived_key(commit.run, None, commit.version, listed)
    bucket.put(key, encode(record))
    return key


JUNK = (b"", b"{}", b'{"run":1}', b"\xff" * 40, b"[" * 1000, b'{"format":9}')


def litter(bucket: Bucket, run: str, version: int) -> int:
    """What is no record, under the keys of records near a version; how many anchors and folds of it."""
    for number, junk in enumerate(JUNK):
        bucket.put(f"runs/{run}/derived/anchor-{version:06d}-{number:012x}.json", junk)
        bucket.put(f"runs/{run}/derived/fold-000000-{version:06d}-{number:012x}.json", junk)
        bucket.put(f"runs/{run}/commits/{version + 100 + number:06d}.json", junk)
        bucket.put(f"replicas/junk-{number}.json", junk)
    return 2 * len(JUNK)


def replay(source: Bucket, target: Bucket) -> None:
    """All that one bucket holds, in another, signatures and all."""
    for stat in [*target.list()]:
        target.delete(stat.key)
    for stat in source.list():
        target.put(stat.key, source.get(stat.key, limit=stat.size))


def roll_back(bucket: Bucket, run: str, version: int, *, head: bytes | None = b"?") -> None:
    """Remove every commit after a version, and leave this HEAD, or none."""
    bucket.delete(*[stat.key for stat in bucket.list(f"runs/{run}/commits/") if stat.key > commit_key(run, version)])
    if head is None:
        bucket.delete(HEAD_KEY)
    else:
        bucket.put(HEAD_KEY, head)
