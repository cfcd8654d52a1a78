"""One run of a bucket, opened: its records, and its payloads with every byte checked."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from deltawire.buckets.base import Bucket, Stat
from deltawire.buckets.verified import get_verified
from deltawire.errors import FormatError
from deltawire.format import delta_file
from deltawire.format.checkpoint import Checkpoint
from deltawire.format.delta_file import DeltaFile
from deltawire.read.adding import Part, add_up
from deltawire.read.anchors import Anchors
from deltawire.read.held import HeldChanges
from deltawire.read.host_cache import HostCache
from deltawire.runlog import log
from deltawire.runlog.bounds import require_codec, require_delta, require_in_table, require_memory
from deltawire.runlog.chain import Chain
from deltawire.runlog.keys import HEAD_KEY, needs_weights, payload_key
from deltawire.runlog.records import Commit, Derived, Run
from deltawire.runlog.signing import Trust, trust
from deltawire.weights.delta import Delta
from deltawire.weights.kept import KeptParts


class OpenedRun:
    """The run that HEAD names at first use, read and checked. Options are `Subscriber`'s."""

    def __init__(
        self,
        bucket: Bucket,
        *,
        base: Path | str | None = None,
        trusted: Iterable[str | Path] | Trust = (),
        cache: HostCache | None = None,
    ) -> None:
        self.bucket = bucket
        self.trust = trusted if isinstance(trusted, Trust) else trust(trusted)
        self._cache = cache
        self._anchors = Anchors(bucket, base=Path(base) if base is not None else None, cache=cache)
        self._opened: Chain | None = None
        self._run_id: str | None = None
        self._wrong: set[str] = set()
        self._held = HeldChanges()

    def close(self) -> None:
        """Remove downloaded anchor files; mappings handed out before stop being usable."""
        self._anchors.close()

    @property
    def fetching(self) -> tuple[int, int] | None:
        """While an anchor is downloaded, how many of its bytes are on this host, and how many there are."""
        return self._anchors.fetching

    def refresh(self) -> None:
        """Forget the records read so far, so that one damaged on its way is read again; the run stays the same."""
        if self._opened is not None:
            self._run_id = self._opened.run.run
            self._opened = None

    @property
    def chain(self) -> Chain:
        """The run's records. Raises NotFound while nothing is published."""
        if self._opened is None:
            run = self._run_id or log.current_run(self.bucket, trust=self.trust)
            self._opened = Chain(self.bucket, log.load_run(self.bucket, run, trust=self.trust), self.trust)
        return self._opened

    @property
    def run(self) -> Run:
        """The run's record, read once, and again after `refresh`. Raises NotFound while nothing is published."""
        return self.chain.run

    def watch(self, *, timeout: float, tag: str | None = None) -> Stat | None:
        """Wait until HEAD's tag differs from `tag`, at most `timeout` seconds."""
        return self.bucket.watch(HEAD_KEY, tag=tag, timeout=timeout)

    def fetch_delta(self, record: Commit | Derived, weights: Mapping[str, Any] | None = None) -> Delta:
        """What a commit or a fold changes, its bytes checked; the digests it leads to are the caller's to compare.
        `weights` are the tensors before it, which a delta of codec `class` is read against.

        Raises BucketError; FormatError for damaged bytes, or those of another version; NeedsBase without the weights
        that it needs, WrongBase where these cannot be they.
        """
        delta = Delta()
        for file in self.open_delta(record):
            delta += add_up([Part(str(record.position), (file,))], weights)[0] if file.needs else file.decode({})
        return delta

    def open_delta(self, record: Commit | Derived, kept: KeptParts | None = None) -> Iterator[DeltaFile]:
        """The files of a commit or a fold, one after another: fetched and checked, no tensor decoded. Of each tensor
        there is to be memory for what is `kept` of it. Raises BucketError; FormatError for damaged bytes, or those of
        another version."""
        names: set[str] = set()
        require_delta(record, self.run.table, f"{self.bucket.url}: {record.position}")
        for payload in record.payloads:
            key = payload_key(record.run, payload.key)
            get = get_verified if self._cache is None else self._cache.get_verified
            data = get(self.bucket, key, size=payload.size, blake3=payload.blake3)
            file = delta_file.open_file(data)
            header = file.header
            if (header.run, header.parent, header.version) != (record.run, record.parent, record.version):
                raise FormatError(f"{key} says {header.run}:{header.parent}→{header.version}, not what its commit says")
            require_codec(header.codec, self.run, key, keyed=needs_weights(payload.key))
            require_in_table(header.tensors, self.chain.entries, key)
            require_memory(header.tensors, key, kept)
            names.update(file.names)
            yield file
        if names != record.digests.keys():
            raise FormatError(f"{record.position}: the payload changes other tensors than the commit lists")

    def open_anchor(self, record: Commit | Derived) -> Checkpoint:
        """The checkpoint of an anchor, or of the first commit of a run, in files on this host; bytes and digests are
        checked. Raises BucketError; BadDigest, FormatError unless it holds the run's table."""
        return self._anchors.sound(record, self.run)

    def read_anchor(self, record: Commit | Derived) -> Checkpoint:
        """As `open_anchor`, but its digests are the caller's to compare."""
        return self._anchors.open(record, self.run)
