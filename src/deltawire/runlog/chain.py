"""One run's records, each read once and each checked: commits in a chain of hashes, folds and anchors that join it.

Everything begins at the newest commit, which HEAD hints at, and goes back from child to parent. So what a reader does
at one version costs the same however long the run is; the whole run is listed only where no hint leads to an anchor.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from functools import partial

from deltawire.buckets.base import Bucket
from deltawire.errors import DAMAGE, BadDigest, Forked, FormatError, Gap, NotFound, UnknownTensor, some
from deltawire.runlog import log, planner
from deltawire.runlog.keys import commit_key, commit_version, commits_prefix, run_prefix, way_key
from deltawire.runlog.log import Filed
from deltawire.runlog.planner import Edge
from deltawire.runlog.records import MAX_RECORD, Commit, Derived, Head, Run, Way, read
from deltawire.runlog.signing import Trust
from deltawire.weights.digest import root as root_of

Hop = tuple[Edge, Filed[Commit] | Filed[Derived]]
"""an edge of a path, and the record that describes it"""
NEAR = 3
"""commits between two versions that are read one by one; from 4 on there may be a fold"""
FAR = 64
"""commits that are walked from a version back to what a hint knows, or from a listed commit to the one HEAD names"""


class Chain:
    """The records of one run in a bucket. Nothing here touches a payload."""

    def __init__(self, bucket: Bucket, run: Filed[Run], trust: Trust) -> None:
        self.bucket, self.filed, self.run = bucket, run, run.record
        self._trust = trust
        self._derived_trust = trust.also(run.record.compactors)
        self.entries = {entry.name: entry for entry in self.run.table}
        self._whole = sum(entry.nbytes for entry in self.run.table)
        self._commits: dict[int, Filed[Commit]] = {}
        self._newest: Filed[Commit] | None = None
        self._known_digests: tuple[str, dict[str, int]] | None = None

    # The newest commit, and the ones before it

    def newest(self, head: Head | None) -> Filed[Commit]:
        """The newest commit: the one that HEAD names, never older than one seen before. Commits that HEAD does not
        know of yet are listed at first, and where HEAD is missing, damaged or older than what was seen.

        Raises NotFound while there is none, FormatError, ChainError."""
        beyond = self._newest is None
        if head is None or commit_version(self.run.run, head.commit) != head.version:
            beyond = True
        elif self._newest is None or head.version > self._newest.record.version or self._is_other_branch(head):
            try:
                self._newest = self._keep(self._load(head.version, head.commit))
            except NotFound:  # a hint is a hint
                beyond = True
        elif head.version < self._newest.record.version:
            beyond = True
        if beyond:
            self._look_beyond()
        if self._newest is None:
            raise NotFound(f"{self.bucket.url}: run {self.run.run} has no commits yet")
        return self._newest

    def versions(self) -> list[int]:
        """Committed versions, ascending, by a listing. One that is staler than what was seen before loses nothing."""
        listed = log.list_versions(self.bucket, self.run.run)
        newest = [] if self._newest is None else [self._newest.record.version]
        return sorted({*listed, *newest})

    def commit(self, version: int, key: str | None = None) -> Filed[Commit]:
        """One commit, by its number; where two writers left two of it, the one on the chain. Raises NotFound,
        FormatError, ChainError."""
        known = self._commits.get(version)
        if known is not None and key in (None, known.key):
            return known
        try:
            return self._keep(self._load(version, key))
        except Forked:
            newest = self._newest or self.newest(log.hinted(self.bucket))
            for filed in self.back(newest):
                if filed.record.version <= version:
                    break
            if filed.record.version != version:
                raise
            return filed

    def parent(self, filed: Filed[Commit]) -> Filed[Commit] | None:
        """The commit before one, which it names by number and hash; None for the first.

        Raises NotFound where it was pruned, Forked where it was rewritten."""
        child = filed.record
        if child.parent is None:
            return None
        known = self._commits.get(child.parent)
        if known is None or child.parent_hash not in (None, known.hash):
            known = self._keep(self._load_parent(child, child.parent))
        if child.parent_hash not in (None, known.hash):
            raise self._broken(child)
        return known

    def back(self, filed: Filed[Commit], *, most: int | None = None) -> Iterator[Filed[Commit]]:
        """A commit and those before it, newest first, at most so many; as far as they are there."""
        here: Filed[Commit] | None = filed
        while here is not None and (most is None or most > 0):
            yield here
            most = None if most is None else most - 1
            with suppress(NotFound):
                here = self.parent(here)
                continue
            return

    def between(self, since: int, filed: Filed[Commit]) -> list[Filed[Commit]]:
        """The commits after version `since` up to this one, oldest first. Raises Gap, Forked unless they lead there."""
        found = []
        for commit in self.back(filed):
            if commit.record.version <= since:
                break
            found.append(commit)
        if found and found[-1].record.parent != since:
            raise self._broken(found[-1].record)
        return found[::-1]

    def settled(self, version: int) -> Filed[Commit]:
        """A commit that a record we write will name for ever: read twice alike, for a record damaged on its way may
        still make sense. Raises BadDigest when it was not."""
        filed = self.commit(version)
        if self._load(version, filed.key).hash != filed.hash:
            raise BadDigest(f"{self._name(filed.record)} was read in two ways; try again")
        return filed

    def commits(self) -> list[Commit]:
        """Every commit from the chain's start, each the child of the one before it, each root that of its digests. It
        reads them all: what asks about one version has cheaper verbs here.

        The start is a run's first commit, or, where older ones were pruned, the oldest that has an anchor.
        """
        listed = log.list_commits(self.bucket, self.run.run)
        if not listed:
            raise NotFound(f"{self.bucket.url}: run {self.run.run} has no commits yet")
        chain = [*self.back(self._newest_listed())][::-1]
        self._require_alone(chain, listed)
        digests, chain = self._from_start(chain)
        for filed in chain:
            digests = self.moved(digests, filed)
        return [filed.record for filed in chain]

    # Digests

    def digests_at(self, version: int) -> dict[str, int]:
        """The digest of every tensor at a committed version, by the records that lead there: an anchor's, then those of
        folds and commits. Raises Gap for a version never committed, BadDigest where they do not make its root."""
        try:
            filed = self.commit(version)
        except NotFound:
            raise self.gap_at(version, self.versions()) from None
        if self._known_digests is not None:
            known, digests = self._known_digests
            if known == filed.hash:
                return dict(digests)
            if known == filed.record.parent_hash:
                return self._remember(filed, self.moved(digests, filed))
        return self._remember(filed, self._summed(filed))

    def _summed(self, filed: Filed[Commit]) -> dict[str, int]:
        passed_over: set[str] = set()
        while True:
            way = self.way(None, filed.record.version, forward=True, without=passed_over)
            digests: dict[str, int] = {}
            here, at = None, way[0]
            try:
                for edge in way:
                    at = edge
                    ((_, hop),) = self.read([edge], here)
                    here, digests = ends_at(edge, hop), self.moved(digests, hop)
                if root_of(self.run.table, digests) != filed.record.root:
                    raise BadDigest(f"{self._name(filed.record)}: the digests that lead there do not make its root")
                return digests
            except DAMAGE:  # only what is wrong is passed over: the rest may be all there is to begin at
                derived = [edge for edge in way if edge.derived]
                wrong = {edge.record for edge in derived if not self.is_of_chain(edge)} or {at.record} & {
                    edge.record for edge in derived
                }
                if not wrong:
                    raise
                passed_over |= wrong

    def is_of_chain(self, edge: Edge) -> bool:
        """Whether a fold or an anchor says of the commits that it joins what they say of themselves."""
        with suppress(*DAMAGE):
            record, end = self._derived(edge).record, self.commit(edge.end)
            start = None if edge.start is None else self.commit(edge.start).hash
            joined = record.commit_hash == end.hash and record.parent_hash in (None, start)
            return joined and record.root == end.record.root
        return False

    def moved(self, digests: dict[str, int], filed: Filed[Commit] | Filed[Derived]) -> dict[str, int]:
        """The digests after one more record. Raises BadDigest where they do not make its root."""
        record = filed.record
        after = digests | as_numbers(record.digests)
        if after.keys() != self.entries.keys() or root_of(self.run.table, after) != record.root:
            where = self._name(record)
            raise BadDigest(f"{where}: its digests do not make its root {record.root[:12]}…: damaged or altered")
        return after

    def _remember(self, filed: Filed[Commit], digests: dict[str, int]) -> dict[str, int]:
        self._known_digests = filed.hash, digests
        return dict(digests)

    def gap_at(self, version: int, there: list[int]) -> Gap:
        """The error for a version that is not among the committed ones, which are `there`, ascending."""
        if not there:
            why = "was never committed; nothing is"
        elif there[0] < version < there[-1]:
            after = next(other for other in there if other > version)
            before = max(other for other in there if other < version)
            why = f"went into version {after} while it waited for the network; there are {before} and {after}"
        elif 0 <= version < there[0]:
            why = f"is pruned; committed are {there[0]} to {there[-1]}"
        else:
            why = f"was never committed; committed are {there[0]} to {there[-1]}"
        return Gap(f"{self.bucket.url}: run {self.run.run}: version {version} {why}")

    # Ways

    def way(
        self,
        since: int | None,
        target: int,
        *,
        anchors: bool = True,
        forward: bool = False,
        without: Collection[str] = (),
        hint: bool = True,
    ) -> list[Edge]:
        """The edges that lead from a version (None: from nothing) to another: the commits between where they are few,
        else the cheapest. `without` are keys of records to pass over; `forward` takes nothing back.

        Raises Gap where nothing leads there."""
        if since is not None and (near := self._near(since, target)) is not None:
            return near
        listed: list[Edge] | None = None
        hinted = self._hinted(since, target) if hint else []
        sources: tuple[Callable[[], list[Edge]], ...] = (lambda: hinted, self.edges, partial(self.edges, checked=True))
        for edges in sources:
            usable = [edge for edge in edges() if edge.record not in without and (anchors or edge.start is not None)]
            with suppress(Gap):
                found = planner.cheapest(usable, since, target, forward=forward)
                if self._are_commits(found):
                    return found
                listed = listed or found
        if listed is not None:
            return listed  # reading it says what is wrong
        raise self._no_way(since, target)

    def edges(self, *, checked: bool = False) -> list[Edge]:
        """Everything that leads somewhere, by a listing of the whole run. `checked` reads every commit, and leaves out
        what lies among them and is none of the chain's."""
        listed = [*self.bucket.list(run_prefix(self.run.run))]
        if checked:
            with suppress(*DAMAGE):
                on_chain = {filed.key for filed in self.back(self._newest_listed())}
                commits = commits_prefix(self.run.run)
                listed = [stat for stat in listed if stat.key in on_chain or not stat.key.startswith(commits)]
        return planner.survey(listed, self.run.run, whole=self._whole, on_chain=self._pick)

    def _are_commits(self, path: Iterable[Edge]) -> bool:
        """Whether the commits of a path are there and continue what was listed before them: junk may lie between."""
        with suppress(*DAMAGE):
            commits = [edge for edge in path if not edge.derived]
            return all(self.commit(edge.end, edge.record).record.parent == edge.start for edge in commits)
        return False

    def anchors(self) -> list[Edge]:
        """The edges that lead from nothing, by version; by a listing of the whole run."""
        return sorted((edge for edge in self.edges() if edge.start is None), key=lambda edge: edge.end)

    def hint(self) -> list[Edge]:
        """The way that a compactor left for joiners; nothing where there is none, or it cannot be read."""
        with suppress(NotFound, FormatError):
            data = self.bucket.get(way_key(self.run.run), limit=MAX_RECORD)
            way = read(Way, data, where=f"{self.bucket.url}/{way_key(self.run.run)}")
            inside = (link for link in way.links if link.record.startswith(run_prefix(self.run.run)))
            return [Edge(link.start, link.end, link.size, link.record) for link in inside]
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
            here = ends_at(edge, filed)
            hops.append((edge, filed))
        return hops

    def _near(self, since: int, target: int) -> list[Edge] | None:
        """The commits between two versions, where they are few."""
        later, earlier = max(since, target), min(since, target)
        found: list[Edge] = []
        with suppress(NotFound):
            for filed in self.back(self.commit(later), most=NEAR):
                if filed.record.version <= earlier:
                    break
                found.append(self._edge_of(filed, undo=target < since))
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
                found.append(self._edge_of(filed))
        return found

    def _no_way(self, since: int | None, target: int) -> Gap:
        where = f"{self.bucket.url}: run {self.run.run}"
        there = self.versions()
        if since is None and there and there[0] <= target:
            return Gap(f"{where}: version {there[0]} is the oldest, and there is no anchor before it to begin at")
        return Gap(f"{where}: nothing leads from version {'none' if since is None else since} to version {target}")

    def _broken(self, child: Commit) -> Gap | Forked:
        """The error for a commit whose parent is not the one before it."""
        below = [version for version in self.versions() if version < child.version]
        if not below or below[-1] == child.parent:
            return Forked(f"{self._name(child)} does not continue the commit {child.parent} there: one was rewritten")
        kind = Forked if child.parent is None or child.parent < below[-1] else Gap
        return kind(f"{self._name(child)} continues version {child.parent}, but the one before it is {below[-1]}")

    def _edge_of(self, filed: Filed[Commit], *, undo: bool = False) -> Edge:
        record = filed.record
        referred = record.parent is None and not record.payloads
        size = self._whole if referred else record.wire_bytes
        return Edge(record.parent, record.version, size, filed.key, undo=undo)

    # Loading and checking

    def _load(self, version: int, key: str | None = None) -> Filed[Commit]:
        filed = log.load_commit(self.bucket, self.run.run, version, key=key, trust=self._trust)
        self._require_known(filed.record.digests, f"commit {filed.record.position}")
        return filed

    def _load_parent(self, child: Commit, version: int) -> Filed[Commit]:
        """By the form of key its hash gives, and by its number alone; the likelier first."""
        run = self.run.run
        keys = [commit_key(run, version)]
        if child.parent_hash is not None:
            keys.append(commit_key(run, version, child.parent_hash))
        likelier = self._newest is not None and self._newest.key != commit_key(run, self._newest.record.version)
        for key in keys[::-1] if likelier else keys:
            with suppress(NotFound):
                return self._load(version, key)
        raise NotFound(f"{self._name(child)} continues version {version}, whose commit is not there")

    def _keep(self, filed: Filed[Commit]) -> Filed[Commit]:
        self._commits[filed.record.version] = filed
        return filed

    def _is_other_branch(self, head: Head) -> bool:
        newest = self._newest
        return newest is not None and head.version == newest.record.version and head.commit != newest.key

    def _look_beyond(self) -> None:
        """Take the newest commit that a listing shows and that continues the one HEAD names, if there is one. What
        does not is a stranger's or a late writer's; without a HEAD the newest is taken as it is."""
        known = self._newest
        listed = log.list_commits(self.bucket, self.run.run, after=-1 if known is None else known.record.version)
        problem: Exception | None = None
        for version, key in reversed(listed):
            try:
                filed = self._keep(self._load(version, key))
                if known is None or len(listed) > FAR or self._continues(filed, known):
                    self._newest = filed
                    return
            except DAMAGE as error:
                self._commits.pop(version, None)
                if known is None and problem is None:
                    problem = error
        if known is None and problem is not None:
            raise problem

    def _continues(self, filed: Filed[Commit], known: Filed[Commit]) -> bool:
        before = self.between(known.record.version, filed)
        return bool(before) and before[0].record.parent_hash in (None, known.hash)

    def _newest_listed(self) -> Filed[Commit]:
        if self._newest is None:
            self._look_beyond()
        assert self._newest is not None
        return self._newest

    def _require_alone(self, chain: list[Filed[Commit]], listed: list[tuple[int, str]]) -> None:
        """Raise Gap or Forked where a listing has commits that are not on the chain that the newest one ends."""
        first, ours = chain[0].record, {filed.record.version for filed in chain}
        if first.parent is not None and (below := [version for version, _ in listed if version < first.version]):
            raise Gap(f"{self._name(first)} continues version {first.parent}, but the one before it is {below[-1]}")
        for version, key in listed:
            beside = first.version <= version <= chain[-1].record.version and version not in ours
            alone = key == commit_key(self.run.run, version)  # where a store can refuse, nobody writes two
            if beside and alone and self._is_commit(version, key):
                raise Forked(f"{self.bucket.url}/{key} is not on the chain that ends at {chain[-1].record.position}")

    def _is_commit(self, version: int, key: str) -> bool:
        """Whether a commit's key holds one: junk is no second writer."""
        with suppress(*DAMAGE):
            self._load(version, key)
            return True
        return False

    def _pick(self, listed: list[tuple[int, str]]) -> list[tuple[int, str]]:
        """Of commits by (version, key), of which two share a version, those on the chain."""
        on_chain = {filed.key for filed in self.back(self._newest_listed())}
        return [(version, key) for version, key in listed if key in on_chain]

    def _derived(self, edge: Edge) -> Filed[Derived]:
        filed = log.load(self.bucket, Derived, edge.record, trust=self._derived_trust)
        record = filed.record
        if (record.run, record.parent, record.version) != (self.run.run, edge.start, edge.end):
            raise FormatError(f"{self.bucket.url}/{edge.record} holds {record.run}:{record.parent}→{record.version}")
        self._require_known(record.digests, edge.record)
        return filed

    def _from_start(self, chain: list[Filed[Commit]]) -> tuple[dict[str, int], list[Filed[Commit]]]:
        """The part of a chain that still has a start, and the digests before its first commit's."""
        first = chain[0].record
        if first.parent is None:
            self._require_our_run(chain[0])
            return {}, chain
        at = {filed.record.version: number for number, filed in enumerate(chain)}
        for edge in self.anchors():
            if edge.end in at and (anchor := self._anchor_of(edge, chain[at[edge.end]])) is not None:
                return as_numbers(anchor.digests), chain[at[edge.end] :]
        raise Gap(f"{self._name(first)} continues version {first.parent}, and there is no anchor before it")

    def _anchor_of(self, edge: Edge, commit: Filed[Commit]) -> Derived | None:
        """The record of an anchor, if it is one, and of this commit: a stranger's stops nobody."""
        with suppress(*DAMAGE):
            anchor = self._derived(edge)
            if anchor.record.commit_hash == commit.hash and not self._differs(anchor, commit):
                return anchor.record
        return None

    def _differs(self, anchor: Filed[Derived], commit: Filed[Commit]) -> bool:
        """Whether an anchor's digests do not make the root of its commit."""
        return root_of(self.run.table, self.moved({}, anchor)) != commit.record.root

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

    def _require_our_run(self, filed: Filed[Commit] | Filed[Derived]) -> None:
        record = filed.record
        first = isinstance(record, Commit) and record.parent is None
        if first and record.parent_hash not in (None, self.filed.hash):
            raise Forked(f"{self._name(record)} was made for another run.json than the one that is there")

    def _require_known(self, digests: dict[str, str], what: str) -> None:
        if foreign := digests.keys() - self.entries.keys():
            names, are = some(map(repr, sorted(foreign))), "is" if len(foreign) == 1 else "are"
            raise UnknownTensor(f"{self.bucket.url}: {what} changes {names}, which {are} not in the run's tensor table")

    def _name(self, record: Commit | Derived) -> str:
        kind = "commit" if isinstance(record, Commit) else "fold" if record.parent is not None else "anchor"
        return f"{self.bucket.url}: {kind} {record.position}"


def ends_at(edge: Edge, filed: Filed[Commit] | Filed[Derived]) -> str | None:
    """The hash of the commit that an edge arrives at; None where an older record does not say."""
    if edge.undo:
        return filed.record.parent_hash
    return filed.record.commit_hash if isinstance(filed.record, Derived) else filed.hash


def as_numbers(digests: dict[str, str]) -> dict[str, int]:
    """Digests as a record writes them, as numbers."""
    return {name: int(value, 16) for name, value in digests.items()}
