"""Read a bucket's run: verified updates in order, or the cheapest change from where a copy stands to a version."""

import itertools
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from deltawire.errors import DAMAGE, ChainError, FormatError, NotFound
from deltawire.format.checkpoint import files
from deltawire.read.adding import Moved
from deltawire.read.changes import Update
from deltawire.read.routes import Routes
from deltawire.runlog.records import Commit, Position
from deltawire.runlog.ways import as_numbers

LOOK_BACK = 64
"""commits that are read to find out which version a copy of unknown origin is"""


class Subscriber(Routes):
    """Follows one run in a bucket. Reading is all it does to the store.

    The run is the one HEAD names at first use; when HEAD moves to another run, OtherRun is raised, not followed.
    `base` is a folder with the base checkpoint, for runs whose version 0 refers to one this host has elsewhere.
    `trusted` are public keys, or files of them: then every record must be signed by one (BadSignature). `cache` is
    shared with the other readers of this host, so that one of them fetches each payload for all: `host_cache()`.
    """

    def __enter__(self) -> "Subscriber":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close()

    def latest(self) -> Position:
        """The newest committed position, never older than one seen before. Raises NotFound while nothing is published,
        OtherRun."""
        return self._newest().record.position

    def commits(self, after: int | None = None) -> list[Commit]:
        """Commits with a version above `after`, in chain order, each the child of the one before it.

        Raises OtherRun, Forked, Gap, BadDigest (a commit whose root is not that of its digests), FormatError.
        """
        self._newest()
        try:
            found = self.chain.commits()
        except (FormatError, ChainError):
            self.refresh()
            raise
        return [commit for commit in found if after is None or commit.version > after]

    def recent(self, most: int | None = None, *, since: float | None = None) -> list[Commit]:
        """The newest commits, oldest first, as far as they are there; nothing else of the run is read. `since` ends at
        the first that is older, in seconds since the epoch by the publisher's clock. Raises as `latest` does."""
        back = (filed.record for filed in self.chain.back(self._newest(), most=most))
        young = itertools.takewhile(lambda commit: since is None or commit.created >= since, back)
        return [*young][::-1]

    def position_at(self, version: int) -> Position:
        """Where a committed version stands. Raises Gap, which names what is there, for one never committed."""
        self._newest()
        try:
            return self.chain.commit(version).record.position
        except NotFound:
            raise self.chain.gap_at(version, self.chain.versions()) from None

    def position_of(self, root: str) -> Position | None:
        """The newest committed version whose weights have this root, or None. It looks at the newest commits, and at
        the anchors, where copies start."""
        for filed in self.chain.back(self._newest(), most=LOOK_BACK):
            if filed.record.root == root:
                return filed.record.position
        for starts in (self.chain.hint, self.chain.anchors):
            for edge in sorted((edge for edge in starts() if edge.start is None), key=lambda edge: -edge.end):
                with suppress(*DAMAGE):
                    if (commit := self.chain.commit(edge.end).record).root == root:
                        return commit.position
        return None

    def anchor_files(self, version: int | None = None) -> list[Path]:
        """The files of the anchor that a version (the newest) is reached from, on this host, downloaded and verified if
        need be: a whole checkpoint. Those of a base may hold the run's aliases too, which no delta moves."""
        version = self._newest().record.version if version is None else version
        return files(self._begin_at(version)[1].folder)

    def digests_at(self, version: int) -> dict[str, int]:
        """The digest of every tensor at a committed version. Raises Gap for a version never committed."""
        return self.chain.digests_at(version)

    def updates(
        self, since: Position | None = None, *, until: int | None = None, weights: Mapping[str, Any] | None = None
    ) -> Iterator[Update]:
        """Verified updates in order from `since` (or from the newest anchor) to `until` (or to the newest commit).

        `weights` are the reader's own, by name, which it moves by each update before it asks for the next. A run whose
        deltas may be of codec `class` needs them from `since` on; from an anchor on they save a copy of what changed.

        Raises BucketError; FormatError for damaged bytes, NeedsBase without the weights that a delta needs; OtherRun,
        Gap or Forked when `since` is not on this chain.
        """
        newest, moved = self._newest(), None
        if until is not None:
            self.digests_at(until)  # says which versions there are
        last = newest if until is None else self.chain.commit(until)
        if since is not None:
            digests, parent = self.digests_at(self._stand_on(since).version), since
        else:
            first, anchor = self._begin_at(last.record.version)
            digests, parent = as_numbers(first.record.digests), first.record.position
            delivered = self.chain.commit(parent.version).record
            yield Update(parent, None, None, anchor, digests, delivered, first.record.wire_bytes)
            if weights is None and self.run.needs_weights:
                weights = moved = Moved(anchor)
        for filed in self.chain.between(parent.version, last):
            commit, digests = filed.record, self.chain.moved(digests, filed)
            delta = self.fetch_delta(commit, weights)
            yield Update(commit.position, parent, delta, None, digests, commit, commit.wire_bytes)
            parent = commit.position
            if moved is not None:
                moved.move(delta)
