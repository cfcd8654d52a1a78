"""Read a bucket's run: verified updates in order, or the cheapest change from where a copy stands to a version."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from deltawire import log, paths, wire
from deltawire.anchors import Anchors
from deltawire.buckets.base import Bucket, Stat
from deltawire.buckets.verified import get_verified
from deltawire.chain import Chain, as_numbers, ends_at
from deltawire.changes import Change, Update
from deltawire.checkpoint import Checkpoint, files
from deltawire.delta import Delta
from deltawire.errors import (
    ChainError,
    Forked,
    FormatError,
    Gap,
    NotFound,
    OtherRun,
)
from deltawire.manifests import HEAD_KEY, Commit, Derived, Position, Run, commit_key, require_in_table
from deltawire.paths import Edge
from deltawire.signing import Trust, trust

PLANS = 3
"""times a path is planned anew when something on it was pruned meanwhile"""
LOOK_BACK = 64
"""commits that are read to find out which version a copy of unknown origin is"""


class Subscriber:
    """Follows one run in a bucket. Reading is all it does to the store.

    The run is the one HEAD names at first use; when HEAD moves to another run, OtherRun is raised, not followed.
    `base` is a folder with the base checkpoint, for runs whose version 0 refers to one this host has elsewhere.
    `trusted` are public keys, or files of them: then every record must be signed by one (BadSignature).
    """

    def __init__(
        self, bucket: Bucket, *, base: Path | str | None = None, trusted: Iterable[str | Path] | Trust = ()
    ) -> None:
        self.bucket = bucket
        self.trust = trusted if isinstance(trusted, Trust) else trust(trusted)
        self._anchors = Anchors(bucket, base=Path(base) if base is not None else None)
        self._opened: Chain | None = None

    def __enter__(self) -> "Subscriber":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove downloaded anchor files; mappings handed out before stop being usable."""
        self._anchors.close()

    def refresh(self) -> None:
        """Forget the records read so far, so that one damaged on its way is read again; the run stays the same."""
        if self._opened is not None:
            self._opened = Chain(self.bucket, self._opened.filed, self.trust)

    @property
    def chain(self) -> Chain:
        """The run's records. Raises NotFound while nothing is published."""
        if self._opened is None:
            run = log.load_run(self.bucket, log.current_run(self.bucket), trust=self.trust)
            self._opened = Chain(self.bucket, run, self.trust)
        return self._opened

    @property
    def run(self) -> Run:
        """The run's record, read once. Raises NotFound while nothing is published."""
        return self.chain.run

    def latest(self) -> Position:
        """The newest committed position, never older than one seen before. Raises NotFound while nothing is published,
        OtherRun."""
        hinted = self._require_same_run()
        newest = max(self.chain.versions(), default=-1)
        if hinted > newest:  # the listing is staler than HEAD; or HEAD is wrong, and then there is no such commit
            with suppress(NotFound):
                return self.chain.commit(hinted).record.position
        if newest < 0:
            raise NotFound(f"{self.bucket.url}: run {self.run.run} has no commits yet")
        return self.chain.commit(newest).record.position

    def commits(self, after: int | None = None) -> list[Commit]:
        """Commits with a version above `after`, in chain order, each the child of the one before it.

        Raises OtherRun, Forked, Gap, BadDigest (a commit whose root is not that of its digests), FormatError.
        """
        self._require_same_run()
        try:
            found = self.chain.commits()
        except (FormatError, ChainError):
            self.refresh()
            raise
        return [commit for commit in found if after is None or commit.version > after]

    def position_of(self, root: str) -> Position | None:
        """The newest committed version whose weights have this root, or None. Looked at are anchors, where copies
        start, and the newest commits."""
        versions = self.chain.versions()
        starts = [edge.end for edge in self.chain.anchors() if edge.end in versions]
        for version in sorted({*starts, *versions[-LOOK_BACK:]}, reverse=True):
            commit = self.chain.commit(version).record
            if commit.root == root:
                return commit.position
        return None

    def digests_at(self, version: int) -> dict[str, int]:
        """The digest of every tensor at a committed version. Raises Gap for a version never committed."""
        return self.chain.digests_at(version)

    def updates(self, since: Position | None = None, *, until: int | None = None) -> Iterator[Update]:
        """Verified updates in order from `since` (or from the newest anchor) to `until` (or to the newest commit).

        Raises BucketError; FormatError for damaged bytes; OtherRun, Gap or Forked when `since` is not on this chain.
        """
        commits = self.commits()
        if until is not None:
            self.digests_at(until)  # says which versions there are
        parent = None if since is None else self._stand_on(since)
        last = until if until is not None else commits[-1].version
        start = self._anchor_before(commits, last) if since is None else since.version
        digests: dict[str, int] = {}
        for commit in commits:
            if commit.version > last:
                return
            digests = digests | (as_numbers(commit.digests) if digests else self.digests_at(commit.version))
            if commit.version < start:
                continue
            if parent is None:
                record = self._anchor_record(commit.version)
                yield Update(commit.position, None, None, self.open_anchor(record), digests, commit, record.wire_bytes)
            elif commit.version > parent.version:
                delta = self.fetch_delta(commit)
                yield Update(commit.position, parent, delta, None, digests, commit, commit.wire_bytes)
            else:
                continue
            parent = commit.position

    def change(self, since: Position | None, version: int, *, anchors: bool = True) -> Change:
        """The cheapest change that leads from `since` (None: from nothing) to a version, older or newer. An anchor may
        be cheaper than what lies between; without `anchors` only deltas and folds are taken.

        What was pruned while it was fetched is planned around. Raises BucketError, FormatError; Gap or Forked when
        `since` is not on this chain.
        """
        for attempt in range(PLANS):
            try:
                return self._change(since, version, anchors or since is None)
            except (FormatError, ChainError):
                self.refresh()
                raise
            except NotFound:
                if attempt == PLANS - 1:
                    raise
        raise AssertionError("unreachable")

    def watch(self, *, timeout: float, tag: str | None = None) -> Stat | None:
        """Wait until HEAD's tag differs from `tag`, at most `timeout` seconds."""
        return self.bucket.watch(HEAD_KEY, tag=tag, timeout=timeout)

    def fetch_delta(self, record: Commit | Derived) -> Delta:
        """What a commit or a fold changes, its bytes checked; the digests it leads to are the caller's to compare.

        Raises BucketError; FormatError for damaged bytes, or those of another version.
        """
        delta = Delta()
        for payload in record.payloads:
            key = f"runs/{record.run}/{payload.key}"
            data = get_verified(self.bucket, key, size=payload.size, blake3=payload.blake3)
            header = wire.read_header(data)
            if (header.run, header.parent, header.version) != (record.run, record.parent, record.version):
                raise FormatError(f"{key} says {header.run}:{header.parent}→{header.version}, not what its commit says")
            require_in_table(header.tensors, self.chain.entries, key)
            delta += wire.decode(data)
        if delta.keys() != record.digests.keys():
            raise FormatError(f"{record.position}: the payload changes other tensors than the commit lists")
        return delta

    def open_anchor(self, record: Commit | Derived) -> Checkpoint:
        """The checkpoint of an anchor, or of the first commit of a run, in files on this host: its bytes are checked,
        its digests are the caller's to compare. Raises BucketError; FormatError unless it holds the run's table."""
        return self._anchors.open(record, self.run)

    def anchor_files(self, version: int | None = None) -> list[Path]:
        """The files of the newest anchor up to a version on this host, downloaded and verified if need be: a whole
        checkpoint."""
        commits = self.commits()
        newest = commits[-1].version if version is None else version
        return files(self._anchors.folder(self._anchor_record(self._anchor_before(commits, newest)), self.run))

    def _change(
        self, since: Position | None, version: int, anchors: bool, passed_over: frozenset[str] = frozenset()
    ) -> Change:
        if since is not None:
            self._stand_on(since)
        edges = [edge for edge in self.chain.edges() if anchors or edge.start is not None]
        usable = [edge for edge in edges if edge.record not in passed_over]
        path = paths.cheapest(usable, None if since is None else since.version, version)
        try:
            return self._fetch(since, version, path)
        except (FormatError, ChainError) as error:
            # Folds and anchors only save bytes: without those on this path, damaged or signed by a stranger, there may
            # be another way. A stranger's must not stop anyone.
            derived = frozenset(edge.record for edge in path if edge.derived)
            if not derived:
                raise
            self.refresh()
            try:
                return self._change(since, version, anchors, passed_over | derived)
            except Gap:
                raise error from None

    def _fetch(self, since: Position | None, version: int, path: list[Edge]) -> Change:
        hops = self.chain.read(path, None if since is None else self.chain.commit(since.version).hash)
        commit = self.chain.commit(version)
        delta, anchor, anchor_position = Delta(), None, None
        for edge, filed in hops:
            if edge.start is None:
                anchor = self.open_anchor(filed.record)
                anchor_position = filed.record.position
            else:
                part = self.fetch_delta(filed.record)
                delta += -part if edge.undo else part
        if hops and ends_at(*hops[-1]) not in (None, commit.hash):
            raise Forked(f"{self.bucket.url}: the path to version {version} ends at another commit of that number")
        read = {edge.record for edge, _ in hops} | {commit_key(self.run.run, version)}
        payloads = [payload for _, filed in hops for payload in filed.record.payloads]
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
        )

    def _require_same_run(self) -> int:
        """The version that HEAD hints at, -1 without one. Raises OtherRun."""
        run = self.run.run
        try:
            head = log.read_head(self.bucket)
        except NotFound:  # it is a hint, and we know the run
            return -1
        if head.run != run:
            raise OtherRun(
                f"{self.bucket.url} moved from run {run} to run {head.run}, which does not continue it; "
                "restart with a fresh position to follow the new run"
            )
        return head.version

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

    def _anchor_before(self, commits: list[Commit], version: int) -> int:
        """The newest version up to this one that is an anchor."""
        if commits[0].parent is None and commits[0].version == version:
            return version
        found = [edge.end for edge in self.chain.anchors() if commits[0].version <= edge.end <= version]
        if not found:
            raise Gap(f"{self.bucket.url}: run {self.run.run}: no anchor up to version {version} is there any more")
        return found[-1]

    def _anchor_record(self, version: int) -> Commit | Derived:
        edge = next(edge for edge in self.chain.anchors() if edge.end == version)
        return self.chain.read([edge])[0][1].record
