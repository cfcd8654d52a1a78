"""Read a bucket's run: verified updates in order, from an anchor or a known position up to the newest commit."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from deltawire import log, wire
from deltawire.bases import base_of
from deltawire.bits import Bits
from deltawire.buckets.atomic import file_system_errors
from deltawire.buckets.base import Bucket, Stat
from deltawire.buckets.verified import download_verified, get_verified
from deltawire.checkpoint import Checkpoint, files
from deltawire.delta import Delta
from deltawire.digest import root as root_of
from deltawire.errors import BadDigest, Forked, FormatError, Gap, NotFound, OtherRun, ShapeMismatch, UnknownTensor
from deltawire.manifests import HEAD_KEY, Commit, Position, Run, TensorEntry


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """One step of the chain, its bytes verified.

    Either `delta` leads from `parent` to `position`, or (the first update of a copy that starts from nothing)
    `anchor` holds every tensor at `position`, lazily mapped from files, and `parent` is None. `digests` are those of
    all tensors at `position`; whoever holds the weights compares them with what it got.
    """

    position: Position
    parent: Position | None
    delta: Delta | None
    anchor: Mapping[str, Bits] | None
    digests: Mapping[str, int]
    commit: Commit

    @property
    def wire_bytes(self) -> int:
        """Bytes fetched for this update."""
        return self.commit.wire_bytes


class Subscriber:
    """Follows one run in a bucket. Reading is all it does to the store.

    The run is the one HEAD names at first use; when HEAD moves to another run, OtherRun is raised, not followed.
    `base` is a folder with the base checkpoint, for runs whose version 0 refers to one this host has elsewhere.
    """

    def __init__(self, bucket: Bucket, *, base: Path | str | None = None) -> None:
        self.bucket = bucket
        self._base = Path(base) if base is not None else None
        self._run: Run | None = None
        self._entries: dict[str, TensorEntry] = {}
        self._commits: dict[int, Commit] = {}
        self._newest_digests: dict[str, int] = {}
        self._cache: Path | None = None

    def __enter__(self) -> "Subscriber":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove downloaded anchor files; mappings handed out before stop being usable."""
        if self._cache is not None:
            shutil.rmtree(self._cache, ignore_errors=True)
            self._cache = None

    @property
    def run(self) -> Run:
        """The run's record, read once. Raises NotFound while nothing is published."""
        if self._run is None:
            self._run = log.read_run(self.bucket, log.read_head(self.bucket).run)
            self._entries = {entry.name: entry for entry in self._run.table}
        return self._run

    def latest(self) -> Position:
        """The newest committed position. Raises NotFound while nothing is published, OtherRun."""
        return self.commits()[-1].position

    def commits(self, after: int | None = None) -> list[Commit]:
        """Commits with a version above `after`, in chain order, each the child of the one before it.

        Raises OtherRun, Forked, Gap, BadDigest (a commit whose root is not that of its digests), FormatError.
        """
        self._require_same_run()
        known = self._commits
        for version in log.list_versions(self.bucket, self.run.run):
            if version not in known:
                self._admit(log.read_commit(self.bucket, self.run.run, version))
        if not known:
            raise NotFound(f"{self.bucket.url}: run {self.run.run} has no commits yet")
        return [known[version] for version in known if after is None or version > after]

    def position_of(self, root: str) -> Position | None:
        """The newest committed version whose weights have this root, or None."""
        return next((commit.position for commit in reversed(self.commits()) if commit.root == root), None)

    def digests_at(self, version: int) -> dict[str, int]:
        """The digest of every tensor at a committed version. Raises Gap for a version never committed."""
        if version not in self._commits:
            self.commits()
        if version not in self._commits:
            raise Gap(f"run {self.run.run}: version {version} was never committed; committed are {self._range()}")
        digests: dict[str, int] = {}
        for commit in self._commits.values():
            if commit.version <= version:
                digests |= _digests(commit)
        return digests

    def updates(self, since: Position | None = None, *, until: int | None = None) -> Iterator[Update]:
        """Verified updates in order from `since` (or from the anchor) to `until` (or to the newest commit).

        Raises BucketError; FormatError for damaged bytes; OtherRun, Gap or Forked when `since` is not on this chain.
        """
        commits = self.commits()
        if until is not None and until not in self._commits:
            self.digests_at(until)
        parent = None if since is None else self._stand_on(since)
        digests: dict[str, int] = {}
        for commit in commits:
            if until is not None and commit.version > until:
                return
            digests = digests | _digests(commit)
            if parent is None:
                yield Update(commit.position, None, None, self._fetch_anchor(commit), digests, commit)
            elif commit.version > parent.version:
                yield Update(commit.position, parent, self._fetch_delta(commit), None, digests, commit)
            else:
                continue
            parent = commit.position

    def watch(self, *, timeout: float, tag: str | None = None) -> Stat | None:
        """Wait until HEAD's tag differs from `tag`, at most `timeout` seconds."""
        return self.bucket.watch(HEAD_KEY, tag=tag, timeout=timeout)

    def anchor_files(self) -> list[Path]:
        """The anchor's files on this host, downloaded and verified if need be: a whole checkpoint of version 0."""
        return files(self._anchor_folder(self.commits()[0]))

    def _require_same_run(self) -> None:
        run = self.run.run
        try:
            head = log.read_head(self.bucket)
        except NotFound:  # it is a hint, and we know the run
            return
        if head.run != run:
            raise OtherRun(
                f"{self.bucket.url} moved from run {run} to run {head.run}, which does not continue it; "
                "restart with a fresh position to follow the new run"
            )

    def _admit(self, commit: Commit) -> None:
        """Check that a commit continues the chain known so far, and remember it."""
        last = next(reversed(self._commits.values()), None)
        where = f"{self.bucket.url}: commit {commit.position}"
        if last is None and commit.parent is not None:
            raise Gap(f"{where} continues version {commit.parent}, and there is no anchor before it")
        if last is not None and commit.parent != last.version:
            kind = Forked if commit.parent is None or commit.parent < last.version else Gap
            raise kind(f"{where} continues version {commit.parent}, but the one before it is {last.version}")
        if foreign := commit.digests.keys() - self._entries.keys():
            raise UnknownTensor(f"{where} changes {min(foreign)!r}, which is not in the run's tensor table")
        digests = self._newest_digests | _digests(commit)
        if digests.keys() != self._entries.keys() or root_of(self.run.table, digests) != commit.root:
            raise BadDigest(f"{where}: its digests do not make its root {commit.root[:12]}…: damaged or altered")
        self._commits[commit.version] = commit
        self._newest_digests = digests

    def _range(self) -> str:
        versions = list(self._commits)
        return f"{versions[0]} to {versions[-1]}" if versions else "none"

    def _stand_on(self, since: Position) -> Position:
        if since.run != self.run.run:
            raise OtherRun(f"position {since} is of another run than {self.bucket.url}, which holds {self.run.run}")
        commit = self._commits.get(since.version)
        if commit is None:
            raise Gap(f"run {since.run}: no commit {since.version} to continue from; committed are {self._range()}")
        if commit.root != since.root:
            raise Forked(f"{since}: these weights have root {since.root[:12]}…, the commit says {commit.root[:12]}…")
        return since

    def _fetch_delta(self, commit: Commit) -> Delta:
        delta = Delta()
        for payload in commit.payloads:
            key = f"runs/{commit.run}/{payload.key}"
            data = get_verified(self.bucket, key, size=payload.size, blake3=payload.blake3)
            header = wire.read_header(data)
            if (header.run, header.parent, header.version) != (commit.run, commit.parent, commit.version):
                raise FormatError(f"{key} says {header.run}:{header.parent}→{header.version}, not what its commit says")
            self._check_table(header, key)
            delta += wire.decode(data)
        if delta.keys() != commit.digests.keys():
            raise FormatError(f"commit {commit.position}: the payload changes other tensors than the commit lists")
        return delta

    def _check_table(self, header: wire.DeltaHeader, key: str) -> None:
        for spec in header.tensors:
            entry = self._entries.get(spec.name)
            if entry is None or not entry.trainable:
                raise UnknownTensor(f"{key} changes {spec.name!r}, which the run does not train")
            if (spec.dtype, spec.shape) != (entry.dtype, entry.shape):
                raise ShapeMismatch(f"{key}: {spec.name} is {spec.dtype} {list(spec.shape)}, not as in the run's table")

    def _fetch_anchor(self, commit: Commit) -> Checkpoint:
        checkpoint = Checkpoint(self._anchor_folder(commit))
        for entry in self.run.table:
            if entry.name not in checkpoint:
                raise FormatError(f"anchor {commit.position} lacks tensor {entry.name!r}")
            bits = checkpoint[entry.name]
            if (bits.dtype, bits.shape) != (entry.dtype, entry.shape):
                raise ShapeMismatch(f"anchor {commit.position}: {entry.name} is {bits.dtype} {list(bits.shape)}")
        return checkpoint

    def _anchor_folder(self, commit: Commit) -> Path:
        if not commit.payloads:
            return self._base or base_of(self.run)
        if self._cache is None:
            with file_system_errors(f"{tempfile.gettempdir()} (TMPDIR chooses another disk)"):
                self._cache = Path(tempfile.mkdtemp(prefix="deltawire-"))
        folder = self._cache / f"{commit.run}-{commit.version}"
        with file_system_errors(str(folder)):
            folder.mkdir(exist_ok=True)
        for payload in commit.payloads:
            path = folder / payload.key.rsplit("/", 1)[-1]
            if not path.is_file():
                key = f"runs/{commit.run}/{payload.key}"
                download_verified(self.bucket, key, path, size=payload.size, blake3=payload.blake3)
        return folder


def _digests(commit: Commit) -> dict[str, int]:
    return {name: int(value, 16) for name, value in commit.digests.items()}
