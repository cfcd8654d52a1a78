"""The run log: append a version and read the chain. Write order is payload, commit, head; read order is the reverse.

Invariants (docs/DESIGN.md §4): a commit refers only to durable payloads; committed objects never change; appending the
same attempt twice is the same as once, so retry is the recovery.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from deltawire import manifests
from deltawire.buckets.base import Bucket
from deltawire.errors import AlreadyExists, ChainError, Forked, NotFound
from deltawire.manifests import HEAD_KEY, MAX_RECORD, Commit, Head, Run, commit_key, run_key


@dataclass(frozen=True, slots=True)
class Attempt:
    """Everything one append writes, frozen: a retry sends exactly these bytes until the outcome is known."""

    run: Run
    commit: Commit
    payloads: Mapping[str, bytes | Path]
    """by key below the run; in the commit's order"""


def append(bucket: Bucket, attempt: Attempt, *, on_step: Callable[[str], None] = lambda step: None) -> None:
    """Make a version exist. Idempotent: after a lost acknowledgement it finds its own objects and calls that success.

    `on_step` hears "run", "payload", "commit", "head" after each is durable. Raises Forked when another writer holds
    the commit's place, BucketError.
    """
    run, commit = attempt.run, attempt.commit
    if commit.parent is None:
        _put_once(bucket, run_key(run.run), manifests.write(run))
        on_step("run")
    for key, data in attempt.payloads.items():
        with suppress(AlreadyExists):  # a key holds its content's hash: an earlier try of these very bytes arrived
            bucket.put_new(f"runs/{run.run}/{key}", data)
        on_step("payload")
    _put_once(bucket, commit_key(run.run, commit.version), manifests.write(commit))
    on_step("commit")
    head = Head(run.run, commit.version, commit_key(run.run, commit.version))
    bucket.put(HEAD_KEY, manifests.write(head))
    on_step("head")


def read_head(bucket: Bucket) -> Head:
    """The hint at the newest commit. Raises NotFound while nothing is published, FormatError."""
    try:
        data = bucket.get(HEAD_KEY, limit=MAX_RECORD)
    except NotFound as error:
        raise NotFound(f"{bucket.url} has no {HEAD_KEY}: nothing is published there yet ({error})") from None
    return manifests.read(Head, data, where=f"{bucket.url}/{HEAD_KEY}")


def read_run(bucket: Bucket, run: str) -> Run:
    """A run's record. Raises NotFound, FormatError."""
    key = run_key(run)
    record = manifests.read(Run, bucket.get(key, limit=MAX_RECORD), where=f"{bucket.url}/{key}")
    if record.run != run:
        raise ChainError(f"{bucket.url}/{key} is the record of run {record.run}")
    return record


def read_commit(bucket: Bucket, run: str, version: int) -> Commit:
    """One version's commit. Raises NotFound, FormatError, ChainError."""
    key = commit_key(run, version)
    commit = manifests.read(Commit, bucket.get(key, limit=MAX_RECORD), where=f"{bucket.url}/{key}")
    if (commit.run, commit.version) != (run, version):
        raise ChainError(f"{bucket.url}/{key} holds the commit of {commit.run}:{commit.version}")
    return commit


def list_versions(bucket: Bucket, run: str) -> list[int]:
    """The committed versions of a run, ascending, by a listing alone."""
    prefix = f"runs/{run}/commits/"
    stems = {stat.key: stat.key.removeprefix(prefix).removesuffix(".json") for stat in bucket.list(prefix)}
    numbers = {key: int(stem) for key, stem in stems.items() if stem.isdecimal()}
    return sorted(number for key, number in numbers.items() if key == commit_key(run, number))


def _put_once(bucket: Bucket, key: str, data: bytes) -> None:
    try:
        bucket.put_new(key, data)
    except AlreadyExists:
        if bucket.get(key, limit=MAX_RECORD) != data:
            raise Forked(
                f"{bucket.url}/{key} was written by someone else: two trainers publish one run. Stop one of them"
            ) from None
