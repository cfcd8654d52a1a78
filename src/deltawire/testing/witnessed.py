"""A bucket that checks the invariants of the run log at every write and delete, as the store sees them."""

from contextlib import suppress
from pathlib import Path

from deltawire.buckets.base import Bucket
from deltawire.buckets.forwarding import Forwarding
from deltawire.errors import NotFound
from deltawire.runlog import invariants, log
from deltawire.runlog.invariants import Problem
from deltawire.runlog.keys import HEAD_KEY, RUNS, listed, payload_key, run_prefix
from deltawire.runlog.log import Filed
from deltawire.runlog.records import MAX_RECORD, Commit, Derived, Head, read


class Broken(AssertionError):
    """An invariant does not hold: deltawire wrote, deleted or read what it must not."""


def hold(*problems: Problem) -> None:
    """Raise Broken for the first problem."""
    for problem in problems:
        if problem is not None:
            raise Broken(problem)


class Witnessed(Forwarding):
    """`bucket`, asked about before every write. Writes that an invariant forbids raise Broken, and do not happen.

    It is for one trainer, which writes commits one after another. `problem` is the first that was seen: a wrapper may
    take what is raised for the store's own trouble.
    """

    def __init__(self, bucket: Bucket) -> None:
        super().__init__(bucket)
        self.inside = bucket
        self.problem: Problem = None

    def put(self, key: str, data: bytes | Path) -> None:
        self._look(key, data)
        self.inside.put(key, data)

    def put_new(self, key: str, data: bytes | Path) -> None:
        self._look(key, data)
        self.inside.put_new(key, data)

    def delete(self, *keys: str) -> None:
        self.inside.delete(*keys)
        for run in sorted({key.split("/")[1] for key in keys if key.startswith(RUNS)}):
            self._hold(*problems_of(self.inside, run))

    def _hold(self, *problems: Problem) -> None:
        self.problem = self.problem or next(filter(None, problems), None)
        hold(self.problem)

    def _look(self, key: str, data: bytes | Path) -> None:
        if key == HEAD_KEY:
            self._hold(_head_problem(self.inside, _bytes(data)))
            return
        name = listed(key.split("/")[1], key) if key.startswith(RUNS) else None
        if name is None or _is_there(self.inside, key):
            return
        if name.kind == "commit":
            commit = read(Commit, _bytes(data), where=key)
            self._hold(_refers(self.inside, commit), _continues(commit, _newest(self.inside, commit.run)))
        elif name.kind.endswith("record"):
            derived = read(Derived, _bytes(data), where=key)
            self._hold(_refers(self.inside, derived), _stands_for(self.inside, derived))


def problems_of(bucket: Bucket, run: str) -> list[str]:
    """Every invariant of a run that does not hold, by all of its records."""
    there = {stat.key.removeprefix(run_prefix(run)): stat.size for stat in bucket.list(run_prefix(run))}
    commits = [log.load_commit(bucket, run, version, key=key).record for version, key in log.list_commits(bucket, run)]
    parents = {commit.version: commit.parent for commit in commits}
    derived = [log.load(bucket, Derived, payload_key(run, key)).record for key in there if _is_manifest(run, key)]
    anchors = {record.version for record in [*derived, *commits] if record.parent is None and record.version in parents}
    first = min(anchors, default=0)
    needed = [commit for commit in commits if commit.version > first or commit.parent is None]
    found = [invariants.every_version_is_reachable(parents, anchors)]
    records: list[Commit | Derived] = [*needed, *_kept(derived, first)]
    found += [invariants.payloads_are_durable(record, there) for record in records]
    with suppress(NotFound):
        found.append(_head_problem(bucket, bucket.get(HEAD_KEY, limit=MAX_RECORD)))
    return [problem for problem in found if problem is not None]


def _is_manifest(run: str, key: str) -> bool:
    name = listed(run, payload_key(run, key))
    return name is not None and name.kind.endswith("record")


def _kept(derived: list[Derived], first: int) -> list[Derived]:
    """The anchors that readers begin at, and the folds between kept versions."""
    return [record for record in derived if (record.version if record.parent is None else record.parent) >= first]


def _head_problem(bucket: Bucket, data: bytes) -> Problem:
    head = read(Head, data, where=HEAD_KEY)
    return invariants.head_names_a_commit(head, [head.commit] if _is_there(bucket, head.commit) else [])


def _refers(bucket: Bucket, record: Commit | Derived) -> Problem:
    there = {}
    for payload in record.payloads:
        with suppress(NotFound):
            there[payload.key] = bucket.stat(payload_key(record.run, payload.key)).size
    return invariants.payloads_are_durable(record, there)


def _newest(bucket: Bucket, run: str) -> Filed[Commit] | None:
    for version, key in reversed(log.list_commits(bucket, run)):
        return log.load_commit(bucket, run, version, key=key)
    return None


def _continues(commit: Commit, newest: Filed[Commit] | None) -> Problem:
    if newest is None:
        return invariants.parent_is(commit, None)
    return invariants.parent_is(commit, newest.record.position, newest.hash)


def _stands_for(bucket: Bucket, derived: Derived) -> Problem:
    """A fold or an anchor is of a commit that is there, and has its root."""
    filed = log.load_commit(bucket, derived.run, derived.version)
    if filed.hash != derived.commit_hash or filed.record.root != derived.root:
        return f"the record of {derived.position} is of another commit than the one that is there"
    return None


def _bytes(data: bytes | Path) -> bytes:
    return data.read_bytes() if isinstance(data, Path) else data


def _is_there(bucket: Bucket, key: str) -> bool:
    with suppress(NotFound):
        bucket.stat(key)
        return True
    return False
