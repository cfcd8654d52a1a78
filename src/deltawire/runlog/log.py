"""The run log, read: which run is current, and the records of one, as they lie in the bucket."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from deltawire.buckets.base import Bucket
from deltawire.errors import ChainError, Forked, FormatError, NotFound
from deltawire.runlog import records
from deltawire.runlog.keys import (
    HEAD_KEY,
    RUNS,
    CommitKey,
    commit_key,
    commit_keys,
    commit_version,
    commits_prefix,
    run_key,
    run_of,
)
from deltawire.runlog.records import MAX_HEAD, MAX_RECORD, Commit, Derived, Head, Run, hash_of
from deltawire.runlog.signing import Trust

NOBODY = Trust()
"""no key is asked for: unsigned records are accepted"""
Record = TypeVar("Record", Run, Commit, Derived)


@dataclass(frozen=True, slots=True)
class Filed(Generic[Record]):
    """A record as it lies in the bucket: what it says, the BLAKE3 of its bytes that its children name, and its key."""

    record: Record
    hash: str
    key: str


def load(bucket: Bucket, kind: type[Record], key: str, *, trust: Trust = NOBODY) -> Filed[Record]:
    """A record and its hash. Raises NotFound, FormatError; BadSignature unless a trusted key signed it."""
    where, data = f"{bucket.url}/{key}", bucket.get(key, limit=MAX_RECORD)
    record = records.read(kind, data, where=where)
    trust.check(data, record.signer, record.signature, where=where)
    return Filed(record, hash_of(data), key)


def read_head(bucket: Bucket) -> Head:
    """The hint at the newest commit. Raises NotFound while nothing is published, FormatError."""
    try:
        data = bucket.get(HEAD_KEY, limit=MAX_HEAD)
    except NotFound as error:
        raise NotFound(f"{bucket.url} has no {HEAD_KEY}: nothing is published there yet ({error})") from None
    return records.read(Head, data, where=f"{bucket.url}/{HEAD_KEY}")


def hinted(bucket: Bucket) -> Head | None:
    """HEAD where there is one that can be read: it is a hint, and a damaged one is as good as none."""
    with suppress(NotFound, FormatError):
        return read_head(bucket)
    return None


def current_run(bucket: Bucket, *, trust: Trust = NOBODY) -> str:
    """The run that HEAD names. Where HEAD is damaged or names no run that is there, it is the only run with a commit
    that no other such run supersedes. Anything but a run, or one not signed as `trust` asks, is passed over.

    Raises NotFound while nothing is published, Forked when there are several such runs.
    """
    head = hinted(bucket)
    if head is not None:
        with suppress(NotFound):
            bucket.stat(run_key(head.run))
            return head.run
    found = {run for stat in bucket.list(RUNS) if (run := run_of(stat.key)) is not None}
    if not found:
        return read_head(bucket).run  # says what is there
    if len(found) > 1:
        runs: dict[str, Run] = {}
        for run in found:
            with suppress(NotFound, FormatError, ChainError):
                runs[run] = load_run(bucket, run, trust=trust).record
        earlier = {record.supersedes.run for record in runs.values() if record.supersedes is not None}
        found = {*runs} - earlier or found
    if len(found) != 1:
        named = ", ".join(sorted(found)[:4])
        raise Forked(f"{bucket.url} has no {HEAD_KEY} and {len(found)} runs: {named}; remove all but one")
    return found.pop()


def load_run(bucket: Bucket, run: str, *, trust: Trust = NOBODY) -> Filed[Run]:
    """A run's record and its hash. Raises NotFound, FormatError, ChainError."""
    filed = load(bucket, Run, run_key(run), trust=trust)
    if filed.record.run != run:
        raise ChainError(f"{bucket.url}/{run_key(run)} is the record of run {filed.record.run}")
    return filed


def load_commit(
    bucket: Bucket, run: str, version: int, *, key: str | None = None, trust: Trust = NOBODY
) -> Filed[Commit]:
    """One version's commit, under the key it has, or (by default) under either form of key.

    Raises NotFound, FormatError, ChainError; Forked where two writers committed that version."""
    if key is None:
        key = _find_commit(bucket, run, version)
    filed = load(bucket, Commit, key, trust=trust)
    if (filed.record.run, filed.record.version) != (run, version):
        raise ChainError(f"{bucket.url}/{key} holds the commit of {filed.record.run}:{filed.record.version}")
    if key not in commit_keys(run, version, filed.hash):
        raise ChainError(f"{bucket.url}/{key} holds another record than its key names")
    return filed


def _find_commit(bucket: Bucket, run: str, version: int) -> str:
    plain = commit_key(run, version)
    with suppress(NotFound):
        bucket.stat(plain)
        return plain
    hashed = [stat.key for stat in bucket.list(plain.removesuffix(".json") + "-")]
    found = [key for key in hashed if commit_version(run, key) == version]
    if len(found) > 1:
        raise Forked(f"{bucket.url}: {len(found)} commits {version} of run {run}: two trainers published one run")
    return found[0] if found else plain


def read_run(bucket: Bucket, run: str) -> Run:
    """A run's record. Raises NotFound, FormatError, ChainError."""
    return load_run(bucket, run).record


def list_commits(bucket: Bucket, run: str, *, after: int = -1) -> list[CommitKey]:
    """Where each commit above `after` lies, by version, from a listing alone."""
    prefix = commits_prefix(run)
    start = f"{prefix}{after + 1:06d}" if after >= 0 else ""
    found = ((commit_version(run, stat.key), stat.key) for stat in bucket.list(prefix, after=start))
    return sorted(CommitKey(version, key) for version, key in found if version is not None and version > after)


def list_versions(bucket: Bucket, run: str) -> list[int]:
    """The committed versions of a run, ascending, by a listing alone."""
    return sorted({version for version, _ in list_commits(bucket, run)})


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
