"""The run log, written: payload, commit, head, in that order; reading goes the other way.

Invariants (docs/DESIGN.md §4): a commit refers only to durable payloads; committed objects never change; appending the
same attempt twice is the same as once, so retry is the recovery.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from deltawire.buckets.base import Bucket, fenced
from deltawire.errors import AlreadyExists, ChainError, Forked, FormatError, NotFound, Unavailable
from deltawire.runlog import records
from deltawire.runlog.invariants import payloads_are_durable, require
from deltawire.runlog.keys import HEAD_KEY, commit_key, commit_keys, payload_key, run_key, run_prefix
from deltawire.runlog.log import continues, hinted, load_commit, load_run, read_head
from deltawire.runlog.records import MAX_RECORD, Commit, Head, Run, hash_of


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
        return hash_of(records.write(self.commit))

    def key_in(self, bucket: Bucket) -> str:
        """The key of its commit. Its number alone is the fence against a second writer where a store has one; where
        not, the record's hash in it keeps either from overwriting the other, so that a fork shows."""
        number_alone = fenced(bucket, run_prefix(self.run.run).rstrip("/"))
        return commit_key(self.run.run, self.commit.version, None if number_alone else self.hash)


def append(bucket: Bucket, attempt: Attempt, *, on_step: Callable[[str], None] = lambda step: None) -> None:
    """Make a version exist. Idempotent: after a lost acknowledgement it finds its own objects and calls that success.

    `on_step` hears "run", "payload", "commit", "head" after each is durable. Raises Forked when another writer holds
    the commit's place, or HEAD tells of one: of another trainer of this run, or of a run that took its place;
    BucketError.
    """
    run, commit = attempt.run, attempt.commit
    key = attempt.key_in(bucket)
    begins = commit.parent is None and run.supersedes is None
    if commit.parent is None:
        put_run(bucket, run)
        on_step("run")
    if not begins:
        _require_head_ours(bucket, attempt)
    put_payloads(bucket, run.run, attempt.payloads, on_step=on_step)
    require(payloads_are_durable(commit, _durable_by_now(attempt)), where=f"{bucket.url}/{key}")
    _put_once(bucket, key, records.write(commit))
    on_step("commit")
    head = records.write(Head(run.run, commit.version, key))
    if begins:
        _begin_bucket(bucket, head, run.run)
    else:
        _require_head_ours(bucket, attempt)  # another may have come meanwhile
        bucket.put(HEAD_KEY, head)
    on_step("head")


def _durable_by_now(attempt: Attempt) -> dict[str, int]:
    """The size of each payload of a commit, by key: those just written, and those that other ranks say they wrote."""
    of_others = {payload.key: payload.size for payload in attempt.commit.payloads}
    return of_others | {key: _size(data) for key, data in attempt.payloads.items()}


def _size(data: bytes | Path) -> int:
    return data.stat().st_size if isinstance(data, Path) else len(data)


def put_run(bucket: Bucket, run: Run) -> None:
    """Write a run's record, before anything else of the run. Raises Forked when another is there; BucketError."""
    _put_once(bucket, run_key(run.run), records.write(run))


def put_payloads(
    bucket: Bucket,
    run: str,
    payloads: Mapping[str, bytes | Path],
    *,
    on_step: Callable[[str], None] = lambda step: None,
) -> None:
    """Make payloads durable, by key below the run; a rank of a sharded job does so before its commit is written."""
    for key, data in payloads.items():
        put_payload(bucket, payload_key(run, key), data)
        on_step("payload")


def put_payload(bucket: Bucket, key: str, data: bytes | Path) -> None:
    """Make one payload durable, under a key that holds its content's hash.

    What is there already is an earlier try of these very bytes, or what became of one: if its size (or its MD5, where
    the store's tag is one) is another, it is written again. Raises BucketError; Unavailable when the store says that
    the key exists, and has no such object.
    """
    try:
        bucket.put_new(key, data)
    except AlreadyExists:
        if not _holds(bucket, key, data):
            bucket.put(key, data)


def _holds(bucket: Bucket, key: str, data: bytes | Path) -> bool:
    """Whether the object of a key is `data`, as far as its size and tag tell."""
    with surely_there(bucket, key):
        found = bucket.stat(key)
    if found.size != _size(data):
        return False
    tag = found.tag.strip('"')
    if not re.fullmatch(r"[0-9a-f]{32}", tag):
        return True
    with open(data, "rb") if isinstance(data, Path) else BytesIO(data) as source:
        return hashlib.file_digest(source, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() == tag


@contextmanager
def surely_there(bucket: Bucket, key: str) -> Iterator[None]:
    """Reading a key that the store just said exists. An answer that it is not there is a passing fault. Raises
    Unavailable then."""
    try:
        yield
    except NotFound as error:
        raise Unavailable(
            f"{bucket.url}/{key}: the store says that it exists, and does not have it; try again"
        ) from error


def _put_once(bucket: Bucket, key: str, data: bytes) -> None:
    try:
        bucket.put_new(key, data)
    except AlreadyExists:
        with surely_there(bucket, key):
            found = _foreign(bucket, key, data)
        if found is not None:
            raise Forked(
                f"{bucket.url}/{key} was written by someone else{_holder(found)}: two trainers publish one run. "
                "Stop one of them"
            ) from None


def _begin_bucket(bucket: Bucket, head: bytes, run: str) -> None:
    """The first HEAD of a bucket. Of two trainers that start on an empty one, the second gets an error."""
    try:
        bucket.put_new(HEAD_KEY, head)
    except AlreadyExists:
        with surely_there(bucket, HEAD_KEY):
            found = read_head(bucket)
        if found.run != run:
            raise Forked(
                f"{bucket.url} holds run {found.run}, published by someone else since this trainer opened it: "
                "two trainers publish to one bucket. Stop one of them, or give it a bucket of its own"
            ) from None


def _require_head_ours(bucket: Bucket, attempt: Attempt) -> None:
    """Raise Forked where HEAD tells of another writer than the one who made `attempt`. Read twice before anyone is
    accused: a reading may be damaged."""
    for _ in range(2):
        head = hinted(bucket)
        problem = None if head is None else _foreign_head(bucket, head, attempt)
        if problem is None:
            return
    raise Forked(f"{bucket.url}: {problem}")


def _foreign_head(bucket: Bucket, head: Head, attempt: Attempt) -> str | None:
    """What is wrong with HEAD for one who is about to write `attempt`; None where it is ours or an ancestor's, or
    names nothing that is there."""
    run, commit = attempt.run, attempt.commit
    try:
        if head.run != run.run:
            load_run(bucket, head.run)  # one that is not there was never begun: HEAD is damaged
            if _continues(bucket, run.run, head.run):
                return None
            verb = "was superseded by" if _continues(bucket, head.run, run.run) else "was replaced by"
            return f"run {run.run} {verb} run {head.run} since this trainer opened it; stop this trainer"
        if commit.parent is not None and head.version < commit.parent:
            return None
        ours = {*commit_keys(run.run, commit.version, attempt.hash)}
        if commit.parent is not None:
            ours |= {*commit_keys(run.run, commit.parent, commit.parent_hash)}
        if head.commit in ours:
            return None
        there = load_commit(bucket, run.run, head.version, key=head.commit)
    except (NotFound, FormatError, ChainError):
        return None
    who = f" ({there.record.writer})" if there.record.writer else ""
    return (
        f"{head.commit} was written by someone else{who}: two trainers publish one run. Stop one of them; a restarted "
        "trainer continues from what is there"
    )


def _continues(bucket: Bucket, run: str, earlier: str) -> bool:
    with suppress(NotFound):
        return continues(bucket, run, earlier)
    return False


def _foreign(bucket: Bucket, key: str, ours: bytes) -> bytes | None:
    """What lies under a key, unless it is these bytes. Read twice before anyone is accused: a reading may be wrong."""
    for _ in range(2):
        found = bucket.get(key, limit=MAX_RECORD)
        if found == ours:
            return None
    return found


def _holder(data: bytes) -> str:
    """Who wrote a commit, as far as it can be read."""
    with suppress(Exception):
        writer = records.read(Commit, data, where="").writer
        return f" ({writer})" if writer else ""
    return ""
