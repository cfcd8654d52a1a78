"""From where a copy of the weights stands to a version: by the cheapest way, or by another where that one fails."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

from deltawire.errors import (
    DAMAGE,
    DeltaWireError,
    Forked,
    Gap,
    NeedsBase,
    NotFound,
    OtherRun,
)
from deltawire.format.checkpoint import Checkpoint
from deltawire.read.changes import Change
from deltawire.read.hops import Hops
from deltawire.runlog import log, planner
from deltawire.runlog.keys import HEAD_KEY, run_key
from deltawire.runlog.log import Filed
from deltawire.runlog.planner import Edge
from deltawire.runlog.records import Commit, Derived, Position
from deltawire.runlog.ways import Hop
from deltawire.weights.kept import KeptParts

PLANS = 3
"""times a path is planned again when something on it was pruned meanwhile"""


class Holds(NamedTuple):
    """What a reader holds: the `weights` that it comes from, if any, and what it keeps of each tensor; None: all.
    `later` says that it adds changes up by itself."""

    weights: Mapping[str, Any] | None
    kept: KeptParts | None
    later: bool = False


class Routes(Hops):
    """One run of a bucket, and the ways that lead through it. Options are `Subscriber`'s."""

    def change(
        self,
        since: Position | None,
        version: int,
        *,
        weights: Mapping[str, Any] | None = None,
        anchors: bool = True,
        kept: KeptParts | None = None,
        later: bool = False,
    ) -> Change:
        """The cheapest change that leads from `since` (None: from nothing) to a version, older or newer. An anchor may
        be cheaper than what lies between; without `anchors` only deltas and folds are taken.

        `weights` are the tensors at `since`, by name: deltas of codec `class` are read against them. One that is not
        at hand whole raises NeedsBase when it is asked for, and then, as without `weights`, another way is taken.

        With `kept` the change is of these parts of the tensors alone: each is decoded, cut and forgotten before the
        next one. With `later` nothing is decoded: the change is in `parts`, for `adding.change_of`.

        What was pruned while it was fetched is planned around. Raises BucketError, FormatError; NeedsBase where every
        way needs weights that are not given, WrongBase where those given are not of `since`; Gap or Forked when `since`
        is not on this chain.
        """
        here = None if since is None else self._stand_on(since).version
        holds, passed_over = Holds(weights, {} if later else kept, later), set[str]()
        problem: DeltaWireError | None = None
        for attempt in range(PLANS):
            try:
                way = self._way(here, version, anchors or here is None, passed_over, problem, holds=holds)
            except DAMAGE as error:
                if not passed_over | self._wrong:
                    raise
                problem = problem or error
                break  # what was passed over with what is wrong may be all there is to begin at
            try:
                return self._fetch(since, version, way, holds)
            except NeedsBase as error:
                if holds.weights is None:
                    raise
                holds, problem = holds._replace(weights=None), problem or error
            except DAMAGE as error:
                # Folds and anchors only save bytes: without those on this way, damaged, signed by a stranger or gone,
                # there may be another. A stranger's must not stop anyone.
                derived = {edge.record for edge in way if edge.derived}
                if not derived and (attempt == PLANS - 1 or not isinstance(error, NotFound)):
                    self.refresh()
                    raise problem or error from None
                problem = problem or error
                passed_over |= derived
                self.refresh()
        return self._without_derived(since, version, anchors or since is None, problem, holds)

    def keep(self, change: Change) -> None:
        """Hold what a change decoded, as far as there is room: its weights are what its commit says, so it leads back
        from them."""
        self._held.keep(change.decoded, change.kept)

    def pass_over(self, change: Change) -> bool:
        """Take the folds and anchors of a change for wrong: its weights were not what its commit says. False where it
        had none that was not blamed before: then it is not they who are to blame."""
        blamed, begun = set(change.derived) - self._wrong, change.anchor_position
        if begun is not None and begun == self.chain.commit(begun.version).record.position:
            blamed = {key for key in blamed if "/derived/anchor-" not in key}  # its digests were compared
        self._wrong |= blamed
        return bool(blamed)

    def _way(
        self,
        since: int | None,
        version: int,
        anchors: bool,
        passed_over: set[str],
        problem: DeltaWireError | None,
        *,
        forward: bool = False,
        holds: Holds | None = None,
    ) -> list[Edge]:
        """A way without what was found wrong, for a reader that `holds` something; None: the weights of an anchor.
        Raises the problem that closed the last one, where there is no other."""
        weights, kept = (True, None) if holds is None else (holds.weights is not None, holds.kept)
        ways = partial(
            self.chain.way,
            since,
            version,
            anchors=anchors,
            forward=forward,
            without=passed_over | self._wrong,
            hint=problem is None,
            held=self._held.keys(kept),
        )
        try:
            return ways(weights=weights)
        except Gap:
            if problem is not None:
                raise problem from None
            if weights:
                raise
            ways(weights=True)  # else they would not help
            raise NeedsBase(
                f'{self.bucket.url}: from version {since} to {version} lead deltas of codec "class", which are read '
                f"against the weights before them: pass those at {since} as weights=, or begin at an anchor"
            ) from None

    def _without_derived(
        self,
        since: Position | None,
        version: int,
        anchors: bool,
        problem: DeltaWireError | None,
        holds: Holds,
    ) -> Change:
        """The change by commits alone, after one way after another was closed: from where the reader stands, or from
        the newest anchor that is sound. However many records are junk, each is read once."""
        edges = self.chain.edges(checked=True)
        commits = [edge for edge in edges if not edge.derived and (anchors or edge.start is not None)]
        starts = [edge for edge in edges if edge.start is None and edge.derived and edge.end <= version and anchors]
        here = None if since is None else since.version
        for anchor in [None, *sorted(starts, key=lambda edge: -edge.end)]:
            usable = [*commits, *([anchor] if anchor is not None else [])]
            try:
                if anchor is not None and not self.chain.is_of_chain(anchor):
                    continue
                way = planner.cheapest(usable, here, version, weights=holds.weights is not None)
                return self._fetch(since, version, way, holds)
            except DAMAGE as error:
                problem = problem or error
        assert problem is not None
        raise problem

    def _begin_at(self, version: int) -> tuple[Filed[Commit] | Filed[Derived], Checkpoint]:
        """The anchor that the cheapest way to a version starts at; one that is damaged or gone is passed over."""
        passed_over: set[str] = set()
        problem: DeltaWireError | None = None
        while True:
            first = self._way(None, version, True, passed_over, problem, forward=True)[0]
            try:
                (hop,) = self.chain.read([first])
                filed, commit = hop.filed, self.chain.commit(first.end)
                if hop.ends_at != commit.hash or filed.record.root != commit.record.root:
                    raise Forked(f"{self.bucket.url}/{first.record} is the anchor of another commit {first.end}")
                return filed, self.open_anchor(filed.record)
            except DAMAGE as error:
                if not first.derived:
                    raise
                problem = problem or error
                passed_over.add(first.record)

    def _fetch(self, since: Position | None, version: int, path: list[Edge], holds: Holds) -> Change:
        hops = self.chain.read(path, None if since is None else self.chain.commit(since.version).hash)
        commit, kept = self.chain.commit(version), holds.kept
        anchor, anchor_position, further = None, None, hops
        from_anchor = bool(hops) and hops[0].edge.start is None
        fetched = [hop for hop in hops if self.at_hand(hop, kept, from_anchor=from_anchor) is None]
        if from_anchor:
            first, *further = hops
            anchor, anchor_position = self.open_anchor(first.filed.record), first.filed.record.position
        parts = tuple(self.part(hop, kept, from_anchor=from_anchor) for hop in further) if holds.later else ()
        weights = holds.weights if anchor is None else anchor
        delta, decoded = self.added_up([] if holds.later else further, weights, kept, from_anchor=from_anchor)
        if hops and not _arrives(hops[-1], commit):
            raise Forked(f"{self.bucket.url}: the path to version {version} ends at another commit of that number")
        read = {hop.edge.record for hop in hops} | {commit.key}
        payloads = [payload for hop in fetched for payload in hop.filed.record.payloads]
        return Change(
            since=None if anchor is not None else since,
            position=commit.record.position,
            anchor=anchor,
            anchor_position=anchor_position,
            delta=delta,
            commit=commit.record,
            wire_bytes=sum(payload.size for payload in payloads),
            records=len(read),
            payloads=len(payloads),
            derived=tuple(hop.edge.record for hop in hops if hop.edge.derived),
            kept=kept,
            decoded=decoded,
            parts=parts,
        )

    def _newest(self) -> Filed[Commit]:
        """The newest commit. Raises OtherRun where HEAD names a run that is there and is not ours."""
        run, head = self.run.run, log.hinted(self.bucket)
        if head is not None and head.run != run:
            try:
                self.bucket.stat(run_key(head.run))
            except NotFound:  # a damaged HEAD, and we know the run
                head = None
            else:
                raise OtherRun(
                    f"{self.bucket.url} moved from run {run} to run {head.run}, which does not continue it; "
                    "restart with a fresh position to follow the new run"
                )
        if head is None and not log.list_commits(self.bucket, run):
            raise NotFound(f"{self.bucket.url} has no {HEAD_KEY} and no commits of run {run}")
        return self.chain.newest(head)

    def _stand_on(self, since: Position) -> Position:
        if since.run != self.run.run:
            raise OtherRun(f"position {since} is of another run than {self.bucket.url}, which holds {self.run.run}")
        try:
            commit = self.chain.commit(since.version).record
        except NotFound:
            raise Gap(f"run {since.run}: no commit {since.version} to continue from") from None
        if commit.root != since.root:
            raise Forked(f"{since}: these weights have root {since.root[:12]}…, the commit says {commit.root[:12]}…")
        return since


def _arrives(last: Hop, commit: Filed[Commit]) -> bool:
    """Whether a way ends at a commit, by its hash and, going forward, by its root."""
    return last.ends_at in (None, commit.hash) and (last.edge.undo or last.filed.record.root == commit.record.root)
