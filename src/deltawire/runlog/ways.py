"""The ways through one run: its commits, and the folds and anchors that join them, checked against one another."""

from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from deltawire.errors import DAMAGE, BadDigest, Forked, FormatError, Gap, NotFound, UnknownTensor
from deltawire.runlog import log, planner
from deltawire.runlog.commits import FAR, Commits
from deltawire.runlog.keys import CommitKey, commits_prefix, needs_weights, run_prefix, way_key
from deltawire.runlog.log import Filed
from deltawire.runlog.planner import Edge
from deltawire.runlog.records import MAX_RECORD, Commit, Derived, Way, read
from deltawire.weights.digest import root as root_of

NEAR = 3
"""commits between two versions that are read one by one; from 4 on there may be a fold"""


@dataclass(frozen=True, slots=True)
class Hop:
    """An edge of a way, and the record that describes it."""

    edge: Edge
    filed: Filed[Commit] | Filed[Derived]

    @property
    def ends_at(self) -> str | None:
        """The hash of the commit that it arrives at; None where an older record does not say."""
        record = self.filed.record
        if self.edge.undo:
            return record.parent_hash
        return record.commit_hash if isinstance(record, Derived) else self.filed.hash

    @property
    def needs_weights(self) -> bool:
        """Whether its record says that it is read against the weights at its start."""
        return _needs_weights(self.filed.record)


class Ways(Commits):
    """Everything that leads from one version of a run to another. Nothing here touches a payload."""

    def way(
        self,
        since: int | None,
        target: int,
        *,
        anchors: bool = True,
        forward: bool = False,
        without: Collection[str] = (),
        hint: bool = True,
        weights: bool = True,
        held: Collection[str] = (),
    ) -> list[Edge]:
        """The edges that lead from a version (None: from nothing) to another: the commits between where they are few,
        else the cheapest. `without` are keys of records to pass over; `forward` takes nothing back. `weights` says
        whether those at `since` are at hand, and `held` are records whose change is, so that they lead both ways.

        Raises Gap where nothing leads there."""
        near = None if since is None else self._near(since, target)
        if near is not None and all(edge.record in held or _is_open(edge, weights) for edge in near):
            return near
        listed: list[Edge] | None = None
        hinted = self._hinted(since, target) if hint else []
        sources: tuple[Callable[[], list[Edge]], ...] = (lambda: hinted, self.edges, partial(self.edges, checked=True))
        for edges in sources:
            usable = [
                replace(edge, size=0, needs_weights=False) if edge.record in held else edge
                for edge in edges()
                if edge.record not in without and (anchors or edge.start is not None)
            ]
            with suppress(Gap):
                found = planner.cheapest(usable, since, target, forward=forward, weights=weights)
                if self._are_commits(found):
                    return found
                listed = listed or found
        if listed is not None:
            return listed  # reading it says what is wrong
        raise self._no_way(since, target)

    def edges(self, *, checked: bool = False) -> list[Edge]:
        """Everything that leads somewhere, by a listing of the whole run. `checked` reads every commit, leaves out what
        lies among them and is none of the chain's, and asks each whether it needs weights: a publisher that was killed
        may have left a delta of codec `class` beside the one that was committed."""
        listed = [*self.bucket.list(run_prefix(self.run.run))]
        if checked:
            with suppress(*DAMAGE):
                on_chain = {filed.key for filed in self.back(self._newest_listed())}
                commits = commits_prefix(self.run.run)
                listed = [stat for stat in listed if stat.key in on_chain or not stat.key.startswith(commits)]
        found = planner.survey(listed, self.run.run, whole=self._whole, on_chain=self._pick)
        if checked:
            found = [self._as_recorded(edge) for edge in found]
        anchored = {edge.end for edge in found if edge.start is None}
        return [edge for edge in found if not self._is_gap(edge, anchored)]

    def _is_gap(self, edge: Edge, anchored: Collection[int]) -> bool:
        """Whether two commits only stand beside one another, because what lay between was pruned: then the later one
        has an anchor, and names another parent."""
        if edge.kind != "delta" or edge.start is None or edge.end - edge.start < 2 or edge.end not in anchored:
            return False
        with suppress(*DAMAGE):
            return self.commit(edge.end, edge.record).record.parent != edge.start
        return False

    def _as_recorded(self, edge: Edge) -> Edge:
        """An edge that needs weights where its record says so, and not where a listing alone does."""
        if edge.needs_weights:
            with suppress(*DAMAGE):
                return replace(edge, needs_weights=_needs_weights(self.commit(edge.end, edge.record).record))
        return edge

    def anchors(self) -> list[Edge]:
        """The edges that lead from nothing, by version; by a listing of the whole run."""
        return sorted((edge for edge in self.edges() if edge.start is None), key=lambda edge: edge.end)

    def hint(self) -> list[Edge]:
        """The way that a compactor left for joiners; nothing where there is none, or it cannot be read."""
        with suppress(NotFound, FormatError):
            data = self.bucket.get(way_key(self.run.run), limit=MAX_RECORD)
            way = read(Way, data, where=f"{self.bucket.url}/{way_key(self.run.run)}")
            inside = (link for link in way.links if link.record.startswith(run_prefix(self.run.run)))
            return [
                Edge(link.start, link.end, link.size, link.record, needs_weights=bool(link.needs_weights))
                for link in inside
            ]
        return []

    def read(self, path: Iterable[Edge], since: str | None = None) -> list[Hop]:
        """The records of a path, which starts at the commit whose hash is `since`.

        Raises Forked unless each continues the one before it, hash by hash; NotFound."""
        hops: list[Hop] = []
        here = since
        for edge in path:
            filed = self._derived(edge) if edge.derived else self.commit(edge.end, edge.record)
            record = filed.record
            after = record.commit_hash if isinstance(record, Derived) else filed.hash
            start = after if edge.undo else record.parent_hash
            if record.parent != edge.start:
                raise Gap(f"{self._name(record)} continues version {record.parent}, not the one listed before it")
            if edge.start is not None and None not in (here, start) and here != start:
                raise Forked(f"{self._name(record)} does not continue the commit before it: its parent was rewritten")
            if edge.start is None:
                self.moved({}, filed)
            self._require_our_run(filed)
            hops.append(Hop(edge, filed))
            here = hops[-1].ends_at
        return hops

    def is_of_chain(self, edge: Edge) -> bool:
        """Whether a fold or an anchor says of the commits that it joins what they say of themselves."""
        with suppress(*DAMAGE):
            record, end = self._derived(edge).record, self.commit(edge.end)
            start = None if edge.start is None else self.commit(edge.start).hash
            joined = record.commit_hash == end.hash and record.parent_hash in (None, start)
            return joined and record.root == end.record.root
        return False

    def is_junk(self, edge: Edge) -> bool:
        """Whether what lies under the key of a fold or an anchor is no record of it, or is not signed by whom we trust:
        every reader passes it over."""
        if not edge.derived:
            return False
        try:
            self._derived(edge)
        except (FormatError, UnknownTensor):
            return True
        return False

    def moved(self, digests: dict[str, int], filed: Filed[Commit] | Filed[Derived]) -> dict[str, int]:
        """The digests after one more record. Raises BadDigest where they do not make its root."""
        record = filed.record
        after = digests | as_numbers(record.digests)
        if after.keys() != self.entries.keys() or root_of(self.run.table, after) != record.root:
            where = self._name(record)
            raise BadDigest(f"{where}: its digests do not make its root {record.root[:12]}…: damaged or altered")
        return after

    def _are_commits(self, path: Iterable[Edge]) -> bool:
        """Whether the commits of a path are there and continue what was listed before them: junk may lie between."""
        with suppress(*DAMAGE):
            commits = [edge for edge in path if not edge.derived]
            return all(self.commit(edge.end, edge.record).record.parent == edge.start for edge in commits)
        return False

    def _near(self, since: int, target: int) -> list[Edge] | None:
        """The commits between two versions, where they are few."""
        later, earlier = max(since, target), min(since, target)
        found: list[Edge] = []
        with suppress(NotFound):
            for filed in self.back(self.commit(later), most=NEAR):
                if filed.record.version <= earlier:
                    break
                found.append(self.edge_of(filed, undo=target < since))
        if not found:
            return [] if later == earlier else None
        if found[-1].start != earlier:
            return None
        return found if target < since else found[::-1]

    def _hinted(self, since: int | None, target: int) -> list[Edge]:
        """The hint's edges, the commits from the later version back to where one of them leads, and those from where
        one of them starts back to the earlier version."""
        edges = self.hint()
        ends = {edge.end for edge in edges}
        if not edges or (since is not None and min(since, target) < min(ends)):
            return []  # it knows of later versions alone
        later = target if since is None else max(since, target)
        walks = [self._walked(later, ends)]
        if since is not None and (starts := [end for end in ends if end > min(since, target)]):
            walks.append(self._walked(min(starts), {min(since, target)}))
        return [*edges, *(edge for walk in walks for edge in walk)]

    def _walked(self, version: int, stops: Collection[int]) -> list[Edge]:
        found = []
        with suppress(*DAMAGE):  # a hint may lead where nothing sound is
            for filed in self.back(self.commit(version), most=FAR):
                if filed.record.version in stops:
                    break
                found.append(self.edge_of(filed))
        return found

    def _no_way(self, since: int | None, target: int) -> Gap:
        where = f"{self.bucket.url}: run {self.run.run}"
        there = self.versions()
        if since is None and there and there[0] <= target:
            return Gap(f"{where}: version {there[0]} is the oldest, and there is no anchor before it to begin at")
        return Gap(f"{where}: nothing leads from version {'none' if since is None else since} to version {target}")

    def edge_of(self, filed: Filed[Commit], *, undo: bool = False) -> Edge:
        """The edge that a commit is."""
        record = filed.record
        referred = record.parent is None and not record.payloads
        size = self._whole if referred else record.wire_bytes
        needs = _needs_weights(record)
        return Edge(record.parent, record.version, size, filed.key, undo=undo, needs_weights=needs)

    def _pick(self, listed: list[CommitKey]) -> list[CommitKey]:
        """The commits that are on the chain, where two share a version."""
        on_chain = {filed.key for filed in self.back(self._newest_listed())}
        return [commit for commit in listed if commit.key in on_chain]

    def _derived(self, edge: Edge) -> Filed[Derived]:
        filed = log.load(self.bucket, Derived, edge.record, trust=self._derived_trust)
        record = filed.record
        if (record.run, record.parent, record.version) != (self.run.run, edge.start, edge.end):
            raise FormatError(f"{self.bucket.url}/{edge.record} holds {record.run}:{record.parent}→{record.version}")
        self._require_known(record.digests, edge.record)
        return filed

    def _require_our_run(self, filed: Filed[Commit] | Filed[Derived]) -> None:
        record = filed.record
        first = isinstance(record, Commit) and record.parent is None
        if first and record.parent_hash not in (None, self.filed.hash):
            raise Forked(f"{self._name(record)} was made for another run.json than the one that is there")


def _needs_weights(record: Commit | Derived) -> bool:
    return any(needs_weights(payload.key) for payload in record.payloads)


def _is_open(edge: Edge, weights: bool) -> bool:
    """Whether an edge can be taken as it is, with the weights at its start or without."""
    return not edge.needs_weights or (weights and not edge.undo)


def as_numbers(digests: dict[str, str]) -> dict[str, int]:
    """Digests as a record writes them, as numbers."""
    return {name: int(value, 16) for name, value in digests.items()}
