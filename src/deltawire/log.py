"""The run log: append a version and read the records. Write order is payload, commit, head; read order is the reverse.

Invariants (docs/DESIGN.md §4): a commit refers only to durable payloads; committed objects never change; appending the
same attempt twice is the same as once, so retry is the recovery.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from deltawire import manifests
from deltawire.buckets.base import Bucket
from deltawire.errors import AlreadyExists, ChainError, Forked, NotFound
from deltawire.manifests import HEAD_KEY, MAX_RECORD, Commit, Derived, Head, Run, commit_key, hash_of, run_key
from deltawire.signing import Trust

NOBODY = Trust()
"""no key is asked for: unsigned records are accepted"""
Record = TypeVar("Record", Run, Commit, Derived)


@dataclass(frozen=True, slots=True)
class Filed(Generic[Record]):
    """A record as it lies in the bucket: what it says, and the BLAKE3 of its bytes that its children name."""

    record: Record
    hash: str


@dataclass(frozen=True, slots=True)
class Attempt:
    """Everything one append writes, frozen: a retry sends exactly these bytes until the outcome is known."""

    run: Run
    commit: Commit
    payloads: Mapping[str, bytes | Path]
    """by key below the run, in the commit's order; those of other ranks are durable by now, and not here"""

    @property
    def hash(self) -> str:
        """What the next commit's `parent_hash` will say."""
        return hash_of(manifests.write(self.commit))


def append(bucket: Bucket, attempt: Attempt, *, on_step: Callable[[str], None] = lambda step: None) -> None:
    """Make a version exist. Idempotent: after a lost acknowledgement it finds its own objects and calls that success.

    `on_step` hears "run", "payload", "commit", "head" after each is durable. Raises Forked when another writer holds
    the commit's place, or (found here where the store has no conditional writes) replaced its parent; BucketError.
    """
    run, commit = attempt.run, attempt.commit
    if commit.parent is None:
        put_run(bucket, run)
        on_step("run")
    elif not bucket.conditional_writes:
        _require_our_parent(bucket, commit)
    put_payloads(bucket, run.run, attempt.payloads, on_step=on_step)
    _put_once(bucket, commit_key(run.run, commit.version), manifests.write(commit))
    on_step("commit")
    head = manifests.write(Head(run.run, commit.version, commit_key(run.run, commit.version)))
    if commit.parent is None and run.supersedes is None:
        _begin_bucket(bucket, head, run.run)
    else:
        bucket.put(HEAD_KEY, head)
    on_step("head")


def put_run(bucket: Bucket, run: Run) -> None:
    """Write a run's record, before anything else of the run. Raises Forked when another is there; BucketError."""
    _put_once(bucket, run_key(run.run), manifests.write(run))


def put_payloads(
    bucket: Bucket,
    run: str,
    payloads: Mapping[str, bytes | Path],
    *,
    on_step: Callable[[str], None] = lambda step: None,
) -> None:
    """Make payloads durable, by key below the run; a rank of a sharded job does so before its commit is written."""
    for key, data in payloads.items():
        with suppress(AlreadyExists):  # a key holds its content's hash: an earlier try of these very bytes arrived
            bucket.put_new(f"runs/{run}/{key}", data)
        on_step("payload")


def load(bucket: Bucket, kind: type[Record], key: str, *, trust: Trust = NOBODY) -> Filed[Record]:
    """A record and its hash. Raises NotFound, FormatError; BadSignature unless a trusted key signed it."""
    where, data = f"{bucket.url}/{key}", bucket.get(key, limit=MAX_RECORD)
    record = manifests.read(kind, data, where=where)
    trust.check(data, record.signer, record.signature, where=where)
    return Filed(record, hash_of(data))


def read_head(bucket: Bucket) -> Head:
    """The hint at the newest commit. Raises NotFound while nothing is published, FormatError."""
    try:
        data = bucket.get(HEAD_KEY, limit=MAX_RECORD)
    except NotFound as error:
        raise NotFound(f"{bucket.url} has no {HEAD_KEY}: nothing is published there yet ({error})") from None
    return manifests.read(Head, data, where=f"{bucket.url}/{HEAD_KEY}")


def current_run(bucket: Bucket) -> str:
    """The run that HEAD names; without a HEAD (its writer was killed just before) the only run with a commit.

    Raises NotFound while nothing is published, Forked when there are several such runs.
    """
    try:
        return read_head(bucket).run
    except NotFound:
        found = {stat.key.split("/")[1] for stat in bucket.list("runs/") if stat.key.split("/")[2:3] == ["commits"]}
        if not found:
            raise
    if len(found) > 1:
        raise Forked(
            f"{bucket.url} has no {HEAD_KEY} and {len(found)} runs: {', '.join(sorted(found)[:4])}; remove all but one"
        )
    return found.pop()


def load_run(bucket: Bucket, run: str, *, trust: Trust = NOBODY) -> Filed[Run]:
    """A run's record and its hash. Raises NotFound, FormatError, ChainError."""
    filed = load(bucket, Run, run_key(run), trust=trust)
    if filed.record.run != run:
        raise ChainError(f"{bucket.url}/{run_key(run)} is the record of run {filed.record.run}")
    return filed


def load_commit(bucket: Bucket, run: str, version: int, *, trust: Trust = NOBODY) -> Filed[Commit]:
    """One version's commit and its hash. Raises NotFound, FormatError, ChainError."""
    key = commit_key(run, version)
    filed = load(bucket, Commit, key, trust=trust)
    if (filed.record.run, filed.record.version) != (run, version):
        raise ChainError(f"{bucket.url}/{key} holds the commit of {filed.record.run}:{filed.record.version}")
    return filed


def read_run(bucket: Bucket, run: str) -> Run:
    """A run's record. Raises NotFound, FormatError, ChainError."""
    return load_run(bucket, run).record


def read_commit(bucket: Bucket, run: str, version: int) -> Commit:
    """One version's commit. Raises NotFound, FormatError, ChainError."""
    return load_commit(bucket, run, version).record


def list_versions(bucket: Bucket, run: str) -> list[int]:
    """The committed versions of a run, ascending, by a listing alone."""
    prefix = f"runs/{run}/commits/"
    stems = {stat.key: stat.key.removeprefix(prefix).removesuffix(".json") for stat in bucket.list(prefix)}
    numbers = {key: int(stem) for key, stem in stems.items() if stem.isdecimal()}
    return sorted(number for key, number in numbers.items() if key == commit_key(run, number))


def continues(bucket: Bucket, run: str, earlier: str, *, trust: Trust = NOBODY, depth: int = 64) -> bool:
    """Whether a run supersedes an earlier one, itself or through at most `depth` runs between."""
    for _ in range(depth):
        supersedes = load_run(bucket, run, trust=trust).record.supersedes
        if supersedes is None:
            return False
        if supersedes.run == earlier:
            return True
        run = supersedes.run
    return False


def _put_once(bucket: Bucket, key: str, data: bytes) -> None:
    try:
        bucket.put_new(key, data)
    except AlreadyExists:
        found = _foreign(bucket, key, lambda there: there == data)
        if found is not None:
            raise Forked(
                f"{bucket.url}/{key} was written by someone else{_holder(found)}: two trainers publish one run. "
                "Stop one of them"
            ) from None


def _begin_bucket(bucket: Bucket, head: bytes, run: str) -> None:
    """The first HEAD of a bucket. Of two trainers that start on an empty one, the second is told."""
    try:
        bucket.put_new(HEAD_KEY, head)
    except AlreadyExists:
        found = read_head(bucket)
        if found.run != run:
            raise Forked(
                f"{bucket.url} holds run {found.run}, published by someone else since this trainer opened it: "
                "two trainers publish to one bucket. Stop one of them, or give it a bucket of its own"
            ) from None


def _require_our_parent(bucket: Bucket, commit: Commit) -> None:
    """Where a store cannot refuse a second writer, look whether it overwrote the commit we continue."""
    assert commit.parent is not None
    key = commit_key(commit.run, commit.parent)
    found = _foreign(bucket, key, lambda there: commit.parent_hash in (None, hash_of(there)))
    if found is not None:
        raise Forked(
            f"{bucket.url}/{key} was replaced{_holder(found)}: two trainers publish one run. Stop one of them; "
            "a restarted trainer continues from what is there"
        )


def _foreign(bucket: Bucket, key: str, is_ours: Callable[[bytes], bool]) -> bytes | None:
    """What lies under a key, unless it is ours. Read twice before anyone is accused: a reading may be damaged."""
    for _ in range(2):
        found = bucket.get(key, limit=MAX_RECORD)
        if is_ours(found):
            return None
    return found


def _holder(data: bytes) -> str:
    """Who wrote a commit, as far as it can be read."""
    with suppress(Exception):
        writer = manifests.read(Commit, data, where="").writer
        return f" ({writer})" if writer else ""
    return ""
