"""Capturing in one process that holds every tensor whole: cast, compare, number."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltawire.buckets.base import Bucket
from deltawire.format.checkpoint import Checkpoint
from deltawire.format.codecs import fused
from deltawire.format.codecs.fused import Coding
from deltawire.prepare.names import require_bare
from deltawire.publish import ties
from deltawire.publish.baseline import Baseline
from deltawire.publish.capturer import About, Capture, CaptureOptions
from deltawire.publish.choice import SPARSE, SUBSET, Choice, share_of
from deltawire.publish.comparing import Comparison, not_yet
from deltawire.publish.current_run import holds_run, near_base, newest, newest_of, tip_at, weights_at
from deltawire.publish.devices import Lies, Place
from deltawire.publish.dtypes import Casting
from deltawire.publish.first_anchor import write_anchor
from deltawire.publish.pending import Captured, encode
from deltawire.publish.requirements import among, require_all, require_due, require_usable, warn_of_packed
from deltawire.publish.resuming import require_same_adapter
from deltawire.publish.sender import Tip
from deltawire.publish.sharded.shards import Shard
from deltawire.publish.tracker import ChangeTracker, Transition
from deltawire.read.bases import open_base, resolve_base
from deltawire.read.subscriber import Subscriber
from deltawire.runlog.records import BaseCheckpoint, Position, Run, in_its_format
from deltawire.weights.bits import Bits, count
from deltawire.weights.delta import Delta
from deltawire.weights.table import TensorEntry, aliases_of, with_aliases

Pairs = Iterable[tuple[str, Any]]


class WholeCapturer:
    """The `Capturer` of a process that holds every tensor whole. Files of a first anchor go to the folder `spool`."""

    def __init__(self, bucket: Bucket, spool: Path, options: CaptureOptions) -> None:
        self._spool, self._options, self._casting = spool, options, Casting(options.dtype)
        self._assets = options.assets
        self.transition = Transition()
        self._tracker = ChangeTracker(self.transition, Baseline(options.own))
        self.resumed: Tip | None = None
        self._place = Place(options.baseline, options.devices)
        self._supersedes: Position | None = None
        self._run: Run | None = None
        self._base: BaseCheckpoint | None = None
        self._declared: ties.Ties = {}
        self._aliases: ties.Ties | None = None
        self.next_version, self._choice = 0, SUBSET
        self._shares: dict[str, float] = {}
        if options.supersede:
            self._supersedes = newest(bucket)
        elif holds_run(bucket):
            self._resume(bucket)
        if self.resumed is None:
            self._open_base()
        self._warm_up()

    @property
    def total(self) -> int:
        """Elements in the tensor table."""
        return sum(count(entry.shape) for entry in self._run.table) if self._run else 0

    @property
    def model_bytes(self) -> int:
        """Bytes of one whole version."""
        return sum(entry.nbytes for entry in self._run.table) if self._run else 0

    @property
    def tracker(self) -> ChangeTracker:
        """The baseline, and the change that no version covers yet."""
        return self._tracker

    @property
    def baseline(self) -> Lies:
        """Where the baseline lies."""
        return self._place.describe(self._tracker.baseline)

    @property
    def held_bytes(self) -> int:
        """The most memory that waiting changes can take, once folded: an increment for every element."""
        return self.model_bytes

    def capture(
        self,
        pairs: Pairs,
        *,
        step: int | None,
        metrics: Mapping[str, float] | None,
        cut: int = -1,
        stay: bool = False,
    ) -> Capture:
        """The next version. Only the last statement moves the numbers on, so an error keeps them and the change."""
        started = time.perf_counter()
        about = About.of(step, metrics)
        self._casting.begin()
        self._place.begin()
        if self._run is None and self._base is None:
            first = self._begin(pairs, about)
            return Capture((first,), time.perf_counter() - started, self.total, first.payload_bytes)
        given = ties.Given()
        seen = self._compare(pairs, given, stay=stay)
        seconds = time.perf_counter() - started
        run = self._run or self._begin_on_base({*seen}, given)
        seeded = self._tracker.seeded
        versions = [] if self._run else [self._describe(run, 0, about, digests=seeded, payloads={})]
        delta = Delta(self._tracker.uncovered)
        if delta or not versions:
            versions.append(self._next(run, self.next_version + len(versions), about, delta))
        changed = delta.changed if versions[-1].parent is not None else sum(count(entry.shape) for entry in run.table)
        self.transition.begin()
        self._tracker.cover()
        self._run, self.next_version = run, versions[-1].version + 1
        newest = versions[-1]
        return Capture(tuple(versions), seconds, changed, None if newest.payloads is None else newest.payload_bytes)

    def close(self) -> None:
        """Nothing is held but memory."""

    def _may_encode_later(self) -> bool:
        """Whether the uploader's thread makes the file: a change found on a device is here in a hundredth of the time
        that takes. The first version is encoded at once, for its bytes say whether it continues a run."""
        first = self.resumed.position.version + 1 if self.resumed is not None else 0
        return self._is_on_device and self.next_version > first

    def _next(self, run: Run, version: int, about: About, delta: Delta) -> Captured:
        """The version of a change; with its file, and what was encoded as it was found, unless that is made later."""
        captured, coded = self._describe(run, version, about, delta=delta), self._tracker.coded
        if self._may_encode_later():
            captured = replace(captured, coded=coded)
        else:
            captured = replace(captured, payloads=encode(captured, coded, self._choice.stored(delta, coded)))
        if "class" in self._listed:
            self._shares = {name: share_of(change) for name, change in delta.items()}
        return replace(captured, reason=self._choice.why(captured, on_device=self._is_on_device))

    def _coding(self) -> Callable[[str, Shard], Coding | None]:
        """How each change is encoded as it is found; none is in a run of `gap`."""
        if "subset" not in self._listed:
            return not_yet
        self._choice = choice = self._choose() if "class" in self._listed else SUBSET
        return lambda name, shard: choice.coding(name, shard.whole, self._shares.get(name, 0.0))

    def _choose(self) -> Choice:
        """What this version is encoded in, where there is a choice."""
        chosen = self._options.choose()
        return SPARSE if chosen.whole and self._is_on_device else chosen

    def _warm_up(self) -> None:
        """Compile what the next publish runs of what the host holds: it is to be as short as all others."""
        dtypes = {held.dtype for held in self._tracker.baseline.held.values() if isinstance(held, Bits)}
        if "subset" in self._listed:
            fused.warm_up(dtypes, by_class="class" in self._listed)

    @property
    def _listed(self) -> tuple[str, ...]:
        """The codecs that the run may use."""
        return self._run.may_use if self._run is not None else self._options.codecs

    @property
    def _is_on_device(self) -> bool:
        """Whether any of the baseline lies on a device."""
        return self._tracker.baseline.device_bytes > 0

    def _compare(self, pairs: Pairs, given: ties.Given, *, stay: bool) -> dict[str, str]:
        """Move the baseline to what is given; by its name in the run, the name under which each tensor was given."""
        trainable = {entry.name for entry in self._run.table if entry.trainable} if self._run else None
        held = self._tracker.baseline.held
        tensors = ties.resolved(pairs, self._aliases or {}, held, given if self._run is None else None)
        comparison = Comparison(
            self._tracker, self._casting, held, trainable, self._place, coding=self._coding(), stay=stay
        )
        seen = comparison.run(among(tensors, held))
        self._casting.settle([*seen, *seen.values()])
        return seen

    def _begin(self, pairs: Pairs, about: About) -> Captured:
        """A run's first version, as an anchor. Nothing counts as captured before its files are written."""
        given, tied = ties.Given(), ties.ties_words(self._assets)
        baseline = self._seeded(pairs, given if tied is not False else None)
        names = list(baseline.digests)
        aliases = ties.settle(ties.head_of(names) if tied else {}, given, names, (), baseline.holds_alike)
        for alias in aliases:
            baseline.forget(alias)
        run = self._new_run(with_aliases(baseline.table(baseline.digests), aliases), None)
        payloads = write_anchor(self._spool, run.table, baseline.as_mapping(), assets=self._assets)
        captured = self._describe(run, 0, about, digests=baseline.digests, payloads=payloads)
        self.transition.begin()
        self._tracker, self._run = ChangeTracker(self.transition, baseline), run
        self.next_version, self._aliases = 1, aliases
        self._warm_up()
        return captured

    def _seeded(self, pairs: Pairs, given: ties.Given | None) -> Baseline:
        """The tensors of a run's first publish. They are noted in `given`, unless a config unties them: that of servers
        which hold two."""
        baseline = Baseline(self._options.own)
        for name, tensor in pairs:
            require_due(name, baseline.digests, None)
            if given is not None:
                given.note(name, tensor)
            baseline.seed(name, self._casting.cast(name, tensor, self._casting.served_as(name, tensor)))
        require_all(baseline.digests, None)
        self._casting.settle(baseline.digests)
        require_bare(baseline.digests)
        warn_of_packed(baseline.table(()))
        return baseline

    def _begin_on_base(self, trainable: set[str], given: ties.Given) -> Run:
        """A run whose version 0 is the base by reference."""
        tracker = self._tracker
        for name in tracker.uncovered.keys() - trainable:  # given by a publish that failed, and not by this one
            tracker.take_back(name)
        if self._aliases is None:
            named, fixed = {*trainable, *given.twins}, tracker.baseline.digests
            self._aliases = ties.settle(self._declared, given, named, fixed, tracker.baseline.holds_alike)
        with self.transition:
            tracker.merge(self._aliases, trainable)
        canonical = {self._aliases.get(name, name) for name in trainable}
        return self._new_run(with_aliases(tracker.baseline.table(canonical), self._aliases), self._base)

    def _new_run(self, table: tuple[TensorEntry, ...], base: BaseCheckpoint | None) -> Run:
        options = self._options
        run = Run(options.new_run_id(), table, options.clock(), base, self._supersedes, options.compactors)
        return in_its_format(run, options.codecs)

    def _describe(
        self,
        run: Run,
        version: int,
        about: About,
        *,
        delta: Delta | None = None,
        digests: Mapping[str, int] | None = None,
        payloads: Mapping[str, bytes | Path] | None = None,
    ) -> Captured:
        """A version of the run: a `delta`, or with `payloads` version 0."""
        return Captured(
            run=run,
            version=version,
            parent=version - 1 if version else None,
            versions=1,
            delta=delta or Delta(),
            digests=dict(digests or self._tracker.baseline.digests),
            created=self._options.clock(),
            step=about.step,
            metrics=about.metrics,
            payloads=payloads,
            reason=self._choice.reason,
        )

    def _resume(self, bucket: Bucket) -> None:
        """Rebuild the baseline from the last commit of the run that is already there."""
        with Subscriber(bucket, base=near_base(self._options.base)) as subscriber:
            position = newest_of(subscriber)
            require_same_adapter(subscriber, self._assets)
            self._tracker = ChangeTracker(self.transition, weights_at(subscriber, position, self._options.own))
            self._run, self.next_version = subscriber.run, position.version + 1
            self._aliases = aliases_of(subscriber.run.table)
            self.resumed = tip_at(subscriber, position)

    def _open_base(self) -> None:
        """What a run that begins needs before its first publish: usable assets, and the base's weights."""
        if self._assets is not None:
            require_usable(self._assets)
        if self._options.base is not None:
            self._base = resolve_base(str(self._options.base))
            folder = open_base(self._base)
            baseline = Baseline.of(Checkpoint(folder), self._options.own)
            self._tracker = ChangeTracker(self.transition, baseline)
            self._declared = ties.in_file(folder, baseline.as_mapping(), baseline.digests)
