"""One run's records, each read once and each checked: commits in a chain of hashes, folds and anchors that join it."""

from collections.abc import Iterable

from deltawire import log, paths
from deltawire.buckets.base import Bucket
from deltawire.digest import root as root_of
from deltawire.errors import BadDigest, Forked, FormatError, Gap, NotFound, UnknownTensor
from deltawire.log import Filed
from deltawire.manifests import Commit, Derived, Run
from deltawire.paths import Edge
from deltawire.signing import Trust

Hop = tuple[Edge, Filed[Commit] | Filed[Derived]]
"""an edge of a path, and the record that describes it"""


class Chain:
    """The records of one run in a bucket. Nothing here touches a payload."""

    def __init__(self, bucket: Bucket, run: Filed[Run], trust: Trust) -> None:
        self.bucket, self.filed, self.run = bucket, run, run.record
        self._trust = trust
        self._derived_trust = trust.also(run.record.compactors)
        self.entries = {entry.name: entry for entry in self.run.table}
        self._commits: dict[int, Filed[Commit]] = {}
        self._proven: dict[int, Commit] = {}
        self._start: dict[str, int] = {}
        self._last_digests: dict[str, int] = {}
        self._newest = -1

    def versions(self) -> list[int]:
        """Committed versions, ascending. A listing that is staler than what was seen before loses nothing."""
        listed = log.list_versions(self.bucket, self.run.run)
        self._newest = max([self._newest, *listed])
        return listed if self._newest in listed or self._newest < 0 else sorted({*listed, self._newest})

    def commit(self, version: int) -> Filed[Commit]:
        """One commit. Raises NotFound, FormatError, ChainError."""
        if version not in self._commits:
            filed = log.load_commit(self.bucket, self.run.run, version, trust=self._trust)
            self._require_known(filed.record.digests, f"commit {filed.record.position}")
            self._commits[version] = filed
        return self._commits[version]

    def settled(self, version: int) -> Filed[Commit]:
        """A commit that a record we write will name for ever: read twice alike, for a record damaged on its way may
        still make sense. Raises BadDigest when it was not."""
        filed = self.commit(version)
        if log.load_commit(self.bucket, self.run.run, version, trust=self._trust).hash != filed.hash:
            raise BadDigest(f"{self._name(filed.record)} was read in two ways; try again")
        return filed

    def commits(self) -> list[Commit]:
        """Every commit from the chain's start, each the child of the one before it, each root that of its digests.

        The start is a run's first commit, or, where older ones were pruned, the oldest that has an anchor.
        """
        versions = self.versions()
        if not versions:
            raise NotFound(f"{self.bucket.url}: run {self.run.run} has no commits yet")
        if self._proven and next(iter(self._proven)) not in versions:  # pruned since: begin again
            self._proven, self._last_digests = {}, {}
        for version in versions if self._proven else self._from_start(versions):
            if version not in self._proven and version >= next(iter(self._proven), 0):
                self._admit(self.commit(version))
        return list(self._proven.values())

    def digests_at(self, version: int) -> dict[str, int]:
        """The digest of every tensor at a committed version. Raises Gap for a version never committed."""
        if version not in self._proven:
            self.commits()
        if version not in self._proven:
            raise self.gap_at(version, list(self._proven))
        digests = dict(self._start)
        for commit in self._proven.values():
            if commit.version <= version:
                digests |= as_numbers(commit.digests)
        return digests

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

    def edges(self) -> list[Edge]:
        """Everything that leads somewhere, by one listing."""
        whole = sum(entry.nbytes for entry in self.run.table)
        return paths.survey(self.bucket.list(f"runs/{self.run.run}/"), self.run.run, whole=whole)

    def anchors(self) -> list[Edge]:
        """The edges that lead from nothing, by version."""
        return sorted((edge for edge in self.edges() if edge.start is None), key=lambda edge: edge.end)

    def read(self, path: Iterable[Edge], since: str | None = None) -> list[Hop]:
        """The records of a path, which starts at the commit whose hash is `since`.

        Raises Forked unless each continues the one before it, hash by hash; NotFound."""
        hops: list[Hop] = []
        here = since
        for edge in path:
            filed = self._derived(edge) if edge.derived else self.commit(edge.end)
            record = filed.record
            after = record.commit_hash if isinstance(record, Derived) else filed.hash
            start = after if edge.undo else record.parent_hash
            if record.parent != edge.start:
                raise Gap(f"{self._name(record)} continues version {record.parent}, not the one listed before it")
            if edge.start is not None and None not in (here, start) and here != start:
                raise Forked(f"{self._name(record)} does not continue the commit before it: its parent was rewritten")
            self._require_our_run(filed)
            here = ends_at(edge, filed)
            hops.append((edge, filed))
        return hops

    def _derived(self, edge: Edge) -> Filed[Derived]:
        filed = log.load(self.bucket, Derived, edge.record, trust=self._derived_trust)
        record = filed.record
        if (record.run, record.parent, record.version) != (self.run.run, edge.start, edge.end):
            raise FormatError(f"{self.bucket.url}/{edge.record} holds {record.run}:{record.parent}→{record.version}")
        self._require_known(record.digests, edge.record)
        if record.parent is None:
            complete = record.digests.keys() == self.entries.keys()
            if not complete or root_of(self.run.table, as_numbers(record.digests)) != record.root:
                raise BadDigest(f"{self.bucket.url}/{edge.record}: its digests do not make its root")
        return filed

    def _from_start(self, versions: list[int]) -> list[int]:
        """The versions of the chain that still has a start, which is remembered."""
        self._start = {}
        first = self.commit(versions[0]).record
        if first.parent is None:
            return versions
        for edge in self.anchors():
            if edge.end in versions:
                anchor = self._derived(edge).record
                if anchor.commit_hash != self.commit(edge.end).hash:
                    raise Forked(f"{self.bucket.url}/{edge.record} is the anchor of another commit {edge.end}")
                self._start = as_numbers(anchor.digests)
                return [version for version in versions if version >= edge.end]
        raise Gap(f"{self._name(first)} continues version {first.parent}, and there is no anchor before it")

    def _admit(self, filed: Filed[Commit]) -> None:
        """Check that a commit continues the chain known so far, and remember it."""
        commit, where = filed.record, self._name(filed.record)
        last = next(reversed(self._proven.values()), None)
        if last is not None and commit.parent != last.version:
            kind = Forked if commit.parent is None or commit.parent < last.version else Gap
            raise kind(f"{where} continues version {commit.parent}, but the one before it is {last.version}")
        if last is not None and commit.parent_hash not in (None, self.commit(last.version).hash):
            raise Forked(f"{where} does not continue the commit {last.version} that is there: one was rewritten")
        self._require_our_run(filed)
        known = self._last_digests if last is not None else self._start
        digests = known | as_numbers(commit.digests)
        if digests.keys() != self.entries.keys() or root_of(self.run.table, digests) != commit.root:
            raise BadDigest(f"{where}: its digests do not make its root {commit.root[:12]}…: damaged or altered")
        self._proven[commit.version], self._last_digests = commit, digests

    def _require_our_run(self, filed: Filed[Commit] | Filed[Derived]) -> None:
        record = filed.record
        first = isinstance(record, Commit) and record.parent is None
        if first and record.parent_hash not in (None, self.filed.hash):
            raise Forked(f"{self._name(record)} was made for another run.json than the one that is there")

    def _require_known(self, digests: dict[str, str], what: str) -> None:
        if foreign := digests.keys() - self.entries.keys():
            raise UnknownTensor(
                f"{self.bucket.url}: {what} changes {min(foreign)!r}, which is not in the run's tensor table"
            )

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
