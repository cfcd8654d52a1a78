"""What is true of a run's log whenever something is written or deleted, as functions over values. No I/O.

Each function gives None where its sentence holds, and else says what is wrong. `require` raises that.

| function | cost | who asks |
|---|---|---|
| `payloads_are_durable` | O(payloads) | `writing.append`, before a commit is written |
| `parent_is` | O(1) | a publisher, before it sends a commit |
| `head_names_a_commit` | O(1) | tests, at every write of HEAD |
| `every_version_is_reachable` | O(versions) | a prune, of what it leaves; tests, of the whole bucket |
"""

from collections.abc import Collection, Container, Mapping

from deltawire.errors import BrokenInvariant, some
from deltawire.runlog.keys import commit_version
from deltawire.runlog.records import Commit, Derived, Head, Position

Problem = str | None
"""what is wrong; None where nothing is"""


def require(*problems: Problem, where: str) -> None:
    """Raise BrokenInvariant for the first problem."""
    for problem in problems:
        if problem is not None:
            raise BrokenInvariant(
                f"{where}: {problem}. This is a fault of deltawire: nothing more is written. Keep the bucket as it is, "
                "report what you see, and restart the process"
            )


def payloads_are_durable(record: Commit | Derived, there: Mapping[str, int]) -> Problem:
    """A record refers only to durable payloads. `there` is the size of each, by key below the run."""
    wrong = [payload.key for payload in record.payloads if there.get(payload.key) != payload.size]
    return f"the record of {record.position} refers to {some(wrong)}, not there in its size" if wrong else None


def parent_is(commit: Commit, newest: Position | None, newest_hash: str | None = None) -> Problem:
    """The parent of a new commit is exactly the newest one. Without a newest one it is a run's first commit."""
    if newest is None:
        return None if commit.parent is None else f"commit {commit.position} is the first, and has a parent"
    if (commit.run, commit.parent) != (newest.run, newest.version):
        return f"commit {commit.position} continues version {commit.parent}, and the newest is {newest}"
    if None not in (commit.parent_hash, newest_hash) and commit.parent_hash != newest_hash:
        return f"commit {commit.position} names another record than that of {newest} as its parent"
    return None


def head_names_a_commit(head: Head, keys: Container[str]) -> Problem:
    """HEAD never names a commit that is not there."""
    if commit_version(head.run, head.commit) != head.version:
        return f"HEAD says version {head.version}, and its commit's key is {head.commit}"
    return None if head.commit in keys else f"HEAD names {head.commit}, which is not there"


def every_version_is_reachable(parents: Mapping[int, int | None], anchors: Collection[int]) -> Problem:
    """Every kept version is reachable from a kept anchor. `parents` are those of the kept commits, by version.

    What lies below the oldest anchor is the rest of an interrupted prune, and goes with the next one.
    """
    if not parents:
        return None
    starts = {version for version in anchors if version in parents}
    if not starts:
        return f"there is no anchor for versions {min(parents)} to {max(parents)}"
    sound = set(starts)
    for version in sorted(parents):
        if version > min(starts) and version not in sound:
            if parents[version] not in sound:
                return f"version {version} continues {parents[version]}, which no anchor leads to"
            sound.add(version)
    return None
