"""One run's records as a whole: the digests of every version, and whether the history is sound from its start.

Everything begins at the newest commit, which HEAD hints at, and goes back from child to parent. So what a reader does
at one version costs the same however long the run is; the whole run is listed only where no hint leads to an anchor.
"""

from contextlib import suppress

from deltawire.buckets.base import Bucket
from deltawire.errors import DAMAGE, BadDigest, Forked, Gap, NotFound
from deltawire.runlog import log
from deltawire.runlog.keys import CommitKey, commit_key
from deltawire.runlog.log import Filed
from deltawire.runlog.planner import Edge
from deltawire.runlog.records import Commit, Derived, Run
from deltawire.runlog.signing import Trust
from deltawire.runlog.ways import Ways, as_numbers
from deltawire.weights.digest import root as root_of


class Chain(Ways):
    """The records of one run in a bucket, with the digests that they lead to. Nothing here touches a payload."""

    def __init__(self, bucket: Bucket, run: Filed[Run], trust: Trust) -> None:
        super().__init__(bucket, run, trust)
        self._known_digests: tuple[str, dict[str, int]] | None = None

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
                    (hop,) = self.read([edge], here)
                    here, digests = hop.ends_at, self.moved(digests, hop.filed)
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

    def _remember(self, filed: Filed[Commit], digests: dict[str, int]) -> dict[str, int]:
        self._known_digests = filed.hash, digests
        return dict(digests)

    def _require_alone(self, chain: list[Filed[Commit]], listed: list[CommitKey]) -> None:
        """Raise Gap or Forked where a listing has commits that are not on the chain that the newest one ends. Below an
        anchor that begins it there may be versions that tags keep."""
        first, ours = chain[0].record, {filed.record.version for filed in chain}
        below = [version for version, _ in listed if version < first.version]
        if first.parent is not None and below and first.version not in {edge.end for edge in self.anchors()}:
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
