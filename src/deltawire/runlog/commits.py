"""One run's commits, each read once: from the newest, which HEAD hints at, back from child to parent."""

from collections.abc import Iterator
from contextlib import suppress

from deltawire.buckets.base import Bucket
from deltawire.errors import DAMAGE, BadDigest, Forked, Gap, NotFound, UnknownTensor, some
from deltawire.runlog import log
from deltawire.runlog.keys import commit_key, commit_version
from deltawire.runlog.log import Filed
from deltawire.runlog.records import Commit, Derived, Head, Run
from deltawire.runlog.signing import Trust

FAR = 64
"""commits that are walked from a version back to what a hint knows, or from a listed commit to the one HEAD names"""


class Commits:
    """The commits of one run in a bucket, linked by hash. Nothing here touches a payload."""

    def __init__(self, bucket: Bucket, run: Filed[Run], trust: Trust) -> None:
        self.bucket, self.filed, self.run = bucket, run, run.record
        self._trust = trust
        self._derived_trust = trust.also(run.record.compactors)
        self.entries = {entry.name: entry for entry in self.run.table}
        self._whole = sum(entry.nbytes for entry in self.run.table)
        self._commits: dict[int, Filed[Commit]] = {}
        self._newest: Filed[Commit] | None = None

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

    def gap_at(self, version: int, there: list[int]) -> Gap:
        """The error for a version that is not among the committed ones, which are `there`, ascending."""
        if not there:
            why = "was never committed; nothing is"
        elif there[0] < version < there[-1]:
            after = next(other for other in there if other > version)
            before = max(other for other in there if other < version)
            if self._is_pruned_between(before, after):
                return Gap(f"{self.bucket.url}: run {self.run.run}: version {version} is pruned; a tag keeps {before}")
            why = f"went into version {after} while it waited for the network; there are {before} and {after}"
        elif 0 <= version < there[0]:
            why = f"is pruned; committed are {there[0]} to {there[-1]}"
        else:
            why = f"was never committed; committed are {there[0]} to {there[-1]}"
        return Gap(f"{self.bucket.url}: run {self.run.run}: version {version} {why}")

    def _is_pruned_between(self, before: int, after: int) -> bool:
        """Whether the later of two listed commits names another parent than the earlier."""
        with suppress(*DAMAGE):
            return self.commit(after).record.parent != before
        return False

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

    def _broken(self, child: Commit) -> Gap | Forked:
        """The error for a commit whose parent is not the one before it."""
        below = [version for version in self.versions() if version < child.version]
        if not below or below[-1] == child.parent:
            return Forked(f"{self._name(child)} does not continue the commit {child.parent} there: one was rewritten")
        kind = Forked if child.parent is None or child.parent < below[-1] else Gap
        return kind(f"{self._name(child)} continues version {child.parent}, but the one before it is {below[-1]}")

    def _require_known(self, digests: dict[str, str], what: str) -> None:
        if foreign := digests.keys() - self.entries.keys():
            names, are = some(map(repr, sorted(foreign))), "is" if len(foreign) == 1 else "are"
            raise UnknownTensor(f"{self.bucket.url}: {what} changes {names}, which {are} not in the run's tensor table")

    def _name(self, record: Commit | Derived) -> str:
        kind = "commit" if isinstance(record, Commit) else "fold" if record.parent is not None else "anchor"
        return f"{self.bucket.url}: {kind} {record.position}"
