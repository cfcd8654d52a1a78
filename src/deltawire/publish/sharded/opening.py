"""Where the run of a sharded job opens. Rank 0 decides it for all.

Each rank then reads the shards it turns out to hold: from the last commit, from the base, or as all-zero bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from deltawire.buckets.base import Bucket
from deltawire.errors import MissingTensor
from deltawire.format import checkpoint
from deltawire.format.checkpoint import Checkpoint
from deltawire.publish.capturer import CaptureOptions
from deltawire.publish.current_run import holds_run, near_base, newest, newest_of, tip_at
from deltawire.publish.resuming import require_same_adapter
from deltawire.publish.sender import Tip
from deltawire.publish.sharded.ranks import Ranks
from deltawire.publish.sharded.shards import Shard, part_digest
from deltawire.publish.ties import Ties, in_file, ties_words
from deltawire.read.adding import Part, change_of
from deltawire.read.bases import open_base, resolve_base
from deltawire.read.host_cache import host_cache
from deltawire.read.subscriber import Subscriber
from deltawire.runlog.records import BaseCheckpoint, Position, Run
from deltawire.weights.bits import Bits, zeros
from deltawire.weights.kept import Kept
from deltawire.weights.table import TensorEntry


@dataclass(frozen=True, slots=True)
class Decision:
    """What rank 0 found in the bucket: the run, and the commit it stands at; or what a new run begins with. `codecs`
    are those that a new run lists."""

    run: str
    codecs: tuple[str, ...]
    resumed: Tip | None = None
    base: BaseCheckpoint | None = None
    supersedes: Position | None = None

    @property
    def empty(self) -> bool:
        """Whether the run begins from nothing: all-zero bits, of tensors that the first publish names."""
        return self.resumed is None and self.base is None

    @property
    def where(self) -> str:
        """The place that the run's weights come from, for errors."""
        if self.resumed is not None:
            return str(self.resumed.position)
        return self.base.source if self.base is not None else "the model"


@dataclass(frozen=True, slots=True)
class TieFacts:
    """What rank 0 read of ties, for a run that begins.

    `tied` is what the config says of its word embeddings, and `declared` are the base's aliases.
    """

    tied: bool | None = None
    declared: Ties = field(default_factory=dict)


class Opening:
    """The weights at the position where the run opens, on this rank. Opening is done by every rank; all raise, or none.

    `run` and `table` are those of the run that is continued; else `table` is that of the base, or empty. It is `open`
    until `close`: any shard can be read. `ties` are those of a run that begins.
    """

    def __init__(self, bucket: Bucket, ranks: Ranks, options: CaptureOptions) -> None:
        self._bucket, self._ranks, self._near = bucket, ranks, near_base(options.base)
        self.decision = ranks.from_first(lambda: _decide(bucket, options))
        self.run: Run | None = None
        self.ties = TieFacts()
        self.table: dict[str, TensorEntry] = {}
        self._recorded: dict[str, int] = {}
        self._reader: Subscriber | None = None
        self._weights: Mapping[str, Bits] = {}
        self._since: tuple[Part, ...] = ()
        self.open = True
        problem: Exception | None = None
        try:
            self._open()
        except Exception as error:
            problem = error
        try:
            self.digests = self.add_up_digests(self.table, problem)
            if self.decision.resumed is None:
                self.ties = ranks.from_first(lambda: self._read_ties(options.assets))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove what was downloaded; every shard has been read."""
        if self._reader is not None:
            self._reader.close()
        self._reader, self._weights, self._since, self.open = None, {}, (), False

    def bits(self, entry: TensorEntry, shard: Shard) -> Bits:
        """A shard of a tensor at the opening position; of the rest of the tensor nothing is kept."""
        box = shard.box
        if entry.name not in self._weights:
            return zeros(entry.dtype, box.shape)
        bits = box.cut(self._weights[entry.name])
        change = change_of(entry.name, self._since, self._weights, Kept(entry.shape, [box]))
        if change is not None:
            change.apply_(bits.data)
        return bits

    def add_up_digests(self, table: Mapping[str, TensorEntry], problem: BaseException | None) -> dict[str, int]:
        """The digest of every tensor at the opening position: as its commit says, or added up, each rank reading as
        much as the others. Raises on every rank where one has a problem."""
        width = self._ranks.from_first(lambda: len(table) if problem is None else -1)
        if problem is None and width not in (len(table), -1):
            here = f"the base of rank {self._ranks.rank} has {len(table)} tensors"
            problem = MissingTensor(f"{here}, that of rank 0 has {width}; give every rank the same base")
        sums = np.zeros(max(width, 0), np.uint64)
        if problem is None and width >= 0 and not self._recorded:
            for number, entry in enumerate(table.values()):
                weights = self._weights.get(entry.name)
                data = zeros(entry.dtype, entry.shape).data if weights is None else weights.data
                sums[number] = part_digest(data, self._ranks.rank, self._ranks.size)
        sums = self._ranks.add_up(sums, problem)
        return self._recorded or {name: int(value) for name, value in zip(table, sums, strict=True)}

    def _read_ties(self, assets: Path | None) -> TieFacts:
        """What rank 0 reads of ties for all."""
        if isinstance(self._weights, Checkpoint):
            return TieFacts(None, in_file(self._weights.folder, self._weights, self.digests))
        return TieFacts(ties_words(assets))

    def _open(self) -> None:
        if self.decision.resumed is not None:
            self._reader = Subscriber(self._bucket, base=self._near, cache=host_cache())
            change = self._reader.change(None, self.decision.resumed.position.version, later=True)
            assert change.anchor is not None
            self._weights, self._since, self.run = change.anchor, change.parts, self._reader.run
            self.table = {entry.name: entry for entry in self.run.table}
            self._recorded = self._reader.digests_at(change.position.version)
        elif self.decision.base is not None:
            weights = Checkpoint(open_base(self.decision.base))
            self._weights = weights
            self.table = {name: TensorEntry(name, weights[name].dtype, weights[name].shape) for name in weights}


def _decide(bucket: Bucket, options: CaptureOptions) -> Decision:
    """Rank 0 looks at the bucket for all."""
    if not options.supersede and holds_run(bucket):
        with Subscriber(bucket, base=near_base(options.base)) as subscriber:
            position = newest_of(subscriber)
            require_same_adapter(subscriber, options.assets)
            return Decision(position.run, options.codecs, tip_at(subscriber, position))
    if options.assets is not None:
        checkpoint.assets(options.assets)  # a folder that is not there is named now, not at the first publish
    pinned = None if options.base is None else resolve_base(str(options.base))
    supersedes = newest(bucket) if options.supersede else None
    return Decision(options.new_run_id(), options.codecs, base=pinned, supersedes=supersedes)
