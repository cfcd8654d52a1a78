"""What may go from a bucket: one number, the floor, decides. References go before what they refer to.

The floor is the newest anchor at or below everything that is still wanted. That is the policy's newest anchors, recent
commits, what HEAD names, and what active replicas stand on. A reader at or above it never misses anything. Below it a
tagged version stays, with what leads to it: the versions from the newest anchor at or below it on.
"""

import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from deltawire.buckets.base import Bucket, Stat
from deltawire.errors import Unavailable
from deltawire.read.subscriber import Subscriber
from deltawire.runlog import log, pruning
from deltawire.runlog.heartbeats import Heartbeat, read_all
from deltawire.runlog.invariants import every_version_is_reachable, require
from deltawire.runlog.keys import Kind, Listed, listed, run_prefix
from deltawire.runlog.planner import Edge
from deltawire.runlog.pruning import Span
from deltawire.runlog.signing import trust
from deltawire.runlog.tags import read_tags
from deltawire.upkeep.proofs import Proofs

BATCH = 500
"""keys deleted in one call"""
_ORDER: tuple[Kind, ...] = ("fold record", "anchor record", "commit", "fold", "delta", "anchor")
"""references before referents; among commits the oldest first, so that what is left of a chain is its newest part"""


@dataclass(frozen=True, slots=True)
class Policy:
    """What stays: the chains of the newest `anchors`, what was committed within `hours`, and every tagged version with
    what leads to it. So does what a replica needs whose heartbeat is at most `replica_hours` old."""

    anchors: int = 2
    hours: float = 24.0
    replica_hours: float = 1.0


@dataclass(frozen=True, slots=True)
class PruneList:
    """What goes, in order: everything of the run below version `floor`, but for the versions within `tagged`, which
    tags keep. `reason` says what keeps the rest, `anchors` which versions' anchors readers then begin at, `passed_over`
    which records of anchors are none, and why."""

    floor: int
    keys: tuple[str, ...]
    bytes: int
    reason: str
    anchors: tuple[int, ...] = ()
    passed_over: tuple[str, ...] = ()
    tagged: tuple[Span, ...] = ()
    run: str = ""

    @property
    def objects(self) -> int:
        """Objects that go."""
        return len(self.keys)


@dataclass(frozen=True, slots=True)
class _Object:
    name: Listed
    stat: Stat


def find_prunable(
    bucket: Bucket,
    run: str,
    policy: Policy | None = None,
    *,
    trusted: Iterable[str | Path] = (),
    memory: Path | None = None,
    clock: Callable[[], float] = time.time,
) -> PruneList:
    """What a policy lets go of a run, by one listing and the heartbeats. Changes nothing.

    Where something would go, the anchors that what is left leans on are proved first: record, signature and every byte
    of their files, which `memory`, a file, remembers. One that is not sound counts as not there. `trusted` are public
    keys, or files of them; a signed run's anchors are signed by its own key or its compactors' in any case.

    Raises BucketError, FormatError, ChainError."""
    tags = {tag.name: tag.version for tag in read_tags(bucket, run)}
    heartbeats = read_all(bucket)  # before the listing: a joiner that writes its need later lists later
    hinted = log.hinted(bucket)  # a trainer that died may have left it behind the newest commit
    head = hinted.version if hinted is not None and hinted.run == run else None
    stats = [*bucket.list(run_prefix(run))]
    given = trust(trusted)
    if not given and (signer := log.load_run(bucket, run).record.signer) is not None:
        given = trust([signer])
    wrong: dict[str, str] = {}
    with Subscriber(bucket, trusted=given) as subscriber:
        proofs = Proofs(subscriber, memory=memory)
        while True:
            kept = [stat for stat in stats if stat.key not in wrong]
            found = prunable(
                kept,
                run,
                heartbeats,
                policy or Policy(),
                tags=tags,
                head=head,
                parent_of=lambda version: subscriber.chain.commit(version).record.parent,
                clock=clock,
            )
            problems = _unsound(proofs, kept, run, found) if found.keys else {}
            wrong |= problems
            if not problems:
                return replace(found, passed_over=tuple(f"{key}: {why}" for key, why in sorted(wrong.items())))


def prunable(
    stats: Iterable[Stat],
    run: str,
    heartbeats: Iterable[tuple[Stat, Heartbeat]],
    policy: Policy,
    *,
    tags: Mapping[str, int] | None = None,
    head: int | None = None,
    parent_of: Callable[[int], int | None] | None = None,
    clock: Callable[[], float] = time.time,
) -> PruneList:
    """What a listing lets go; `tags` are the versions that people named, by name. `head` is the version that HEAD
    names: its commit stays, for a writer may have died before it moved HEAD on. `parent_of` reads which version a
    commit continues, where the listing alone does not say; without it that is the one listed before.

    Ages are differences of the store's own timestamps: now is the newest of them, which is never later than the
    store's clock, and not later than this host's: one file from the future makes nobody old. A replica is silent only
    where the store's stamp and the time in its heartbeat both say so."""
    objects, beats = _sorted_out(stats, run), list(heartbeats)
    commits = {item.name.end: item.stat.modified for item in objects if item.name.kind == "commit"}
    anchored = {item.name.end for item in objects if item.name.kind == "anchor record" and item.name.end in commits}
    anchors = sorted(anchored | ({0} & commits.keys()))
    if not anchors:
        return PruneList(0, (), 0, "there is no anchor to start from")
    here = clock()
    now = min(here, max([item.stat.modified for item in objects] + [stat.modified for stat, _ in beats]))
    wanted = {f"the newest {policy.anchors} anchors": anchors[-max(policy.anchors, 1) :][0]}
    if lately := [version for version, when in commits.items() if max(now - when, 0) <= 3600 * policy.hours]:
        wanted[f"commits of the last {policy.hours:g} hours"] = min(lately)
    if head in commits:
        wanted["HEAD.json"] = head
    for stat, beat in beats:
        stands = beat.version if beat.need is None else beat.need
        age = min(max(now - stat.modified, 0), max(here - beat.at, 0) if beat.at is not None else math.inf)
        if beat.run in (None, run) and stands is not None and age <= 3600 * policy.replica_hours:
            wanted[f"replica {beat.replica}"] = stands
    reason, lowest = min(wanted.items(), key=lambda item: item[1])
    floor = max((version for version in anchors if version <= lowest), default=0)
    tagged, floor = _tagged(tags or {}, floor, anchors, sorted(commits), parent_of)
    spans = (*tagged, (floor, sys.maxsize))
    going = [item for item in objects if not any(_within(item.name, span) for span in spans)]
    going.sort(key=lambda item: (_ORDER.index(item.name.kind), *_turn(item.name, spans[0][0]), item.stat.key))
    _require_reachable([version for version in commits if _stays(version, spans)], anchors, run)
    leans_on = tuple(sorted({first for first, _ in spans} | {*anchors[-max(policy.anchors, 1) :]}))
    size = sum(item.stat.size for item in going)
    return PruneList(floor, tuple(item.stat.key for item in going), size, reason, leans_on, tagged=tagged, run=run)


def carry_out(bucket: Bucket, going: PruneList, *, on_step: Callable[[str], None] = lambda step: None) -> None:
    """Delete what a list holds, in its order; `on_step` hears each batch's last key. Interrupted, the next list holds
    what is left, and where that is nothing, what was said of it is taken back. One prune of a run at a time.

    Raises BucketError: Unavailable where a version on the list was given a tag since. Then nothing was deleted, and a
    new list is called for."""
    if not going.keys:
        if going.run and pruning.announced(bucket, going.run) is not None:
            pruning.done(bucket, going.run)
        return
    pruning.announce(bucket, going.run, going.floor, going.tagged)
    _require_untagged(bucket, going)
    for first in range(0, len(going.keys), BATCH):
        batch = going.keys[first : first + BATCH]
        bucket.delete(*batch)
        on_step(batch[-1])
    pruning.done(bucket, going.run)


def _require_untagged(bucket: Bucket, going: PruneList) -> None:
    """Raise Unavailable where a tag names a version whose commit is on a list."""
    commits = {name.end for key in going.keys if (name := listed(going.run, key)) is not None and name.kind == "commit"}
    for tag in read_tags(bucket, going.run):
        if tag.version in commits:
            pruning.done(bucket, going.run)
            raise Unavailable(
                f"{bucket.url}: version {tag.version} was tagged {tag.name} while it was to be pruned; nothing was "
                "deleted; prune again"
            )


def _require_reachable(kept: list[int], anchors: list[int], run: str) -> None:
    """Raise BrokenInvariant unless an anchor that stays leads to every commit that stays."""
    versions = sorted(kept)
    parents = dict(zip(versions, [None, *versions], strict=False))
    require(every_version_is_reachable(parents, anchors), where=f"run {run}")


def _unsound(proofs: Proofs, stats: list[Stat], run: str, pruned: PruneList) -> dict[str, str]:
    """Which records of the anchors that readers then lean on lead to no anchor, and why. A record may
    list the files of an older version that held the same weights."""
    found, going = {}, frozenset(pruned.keys)
    for item in _sorted_out(stats, run):
        if item.name.kind == "anchor record" and item.name.end in pruned.anchors:
            problem = proofs.problem(Edge(None, item.name.end, 0, item.stat.key), going=going)
            if problem is not None:
                found[item.stat.key] = str(problem)
    return found


def _tagged(
    tags: Mapping[str, int],
    floor: int,
    anchors: list[int],
    commits: list[int],
    parent_of: Callable[[int], int | None] | None,
) -> tuple[tuple[Span, ...], int]:
    """What tags keep below the floor, in order: from an anchor to a tagged version. Where a span continues the one
    before it they are one, and where the floor continues the last span, the floor is where that begins."""
    wanted = {version for version in tags.values() if version in commits and anchors[0] <= version < floor}
    spans: list[Span] = []
    for version in [*sorted(wanted), sys.maxsize]:
        first = floor if version == sys.maxsize else max(anchor for anchor in anchors if anchor <= version)
        if spans and (spans[-1][0] == first or _continues(first, spans[-1][1], commits, parent_of)):
            first, _ = spans.pop()
        spans.append((first, version))
    return tuple(spans[:-1]), spans[-1][0]


def _continues(version: int, earlier: int, commits: list[int], parent_of: Callable[[int], int | None] | None) -> bool:
    """Whether a commit is the child of an earlier one: an earlier prune may have taken what lay between."""
    between = any(earlier < commit < version for commit in commits)
    return not between and (parent_of is None or parent_of(version) == earlier)


def _within(name: Listed, span: Span) -> bool:
    """Whether an object is of versions that stay: a delta leads on from their first, a fold joins two of them."""
    first, last = span
    if name.kind == "delta":
        return first < name.end <= last
    if name.start is not None:
        return first <= name.start and name.end <= last
    return first <= name.end <= last


def _stays(version: int, spans: Iterable[Span]) -> bool:
    return any(first <= version <= last for first, last in spans)


def _turn(name: Listed, first: int) -> tuple[bool, int]:
    """When a commit goes: above versions that tags keep the newest goes first, so that what is left of the newest part
    begins at an anchor at every moment. Else the oldest does."""
    between = name.kind == "commit" and name.end > first
    return between, -name.end if between else name.end


def _sorted_out(stats: Iterable[Stat], run: str) -> list[_Object]:
    return [_Object(name, stat) for stat in stats if (name := listed(run, stat.key)) is not None]
