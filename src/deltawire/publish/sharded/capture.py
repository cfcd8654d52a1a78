"""Capturing on one rank of a sharded job: every rank compares what it holds, and one sum makes it a version.

Nothing is gathered. Either every rank has captured the next version, or none has, and each keeps what it found.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from deltawire.buckets.base import Bucket
from deltawire.errors import DeltaWireError
from deltawire.prepare.names import require_bare
from deltawire.publish import ties
from deltawire.publish.baseline import Baseline
from deltawire.publish.capturer import About, Capture, CaptureOptions
from deltawire.publish.choice import SUBSET, Choice
from deltawire.publish.comparing import Comparison, not_yet
from deltawire.publish.devices import Lies, Place
from deltawire.publish.dtypes import Casting
from deltawire.publish.first_anchor import asset_payloads
from deltawire.publish.pending import Captured, encode
from deltawire.publish.requirements import among, warn_of_packed
from deltawire.publish.sharded.ballot import Ballot, digests_of, mark, marks_of, require_alike
from deltawire.publish.sharded.opening import Opening
from deltawire.publish.sharded.ranks import Ranks
from deltawire.publish.sharded.shards import Shard, moved
from deltawire.publish.ties import Given, GivenTensor, Ties
from deltawire.publish.tracker import ChangeTracker, Transition
from deltawire.runlog.records import Run, in_its_format
from deltawire.weights.bits import WIDTHS, count
from deltawire.weights.delta import Delta
from deltawire.weights.table import TensorEntry, aliases_of, with_aliases

Pairs = Iterable[tuple[str, Any]]


@dataclass(frozen=True, slots=True)
class _Found:
    """What one capture found on this rank: the names of the tensors given, the run's aliases, seconds of comparing."""

    aliases: Ties
    names: set[str] = field(default_factory=set)
    about: About = field(default_factory=lambda: About(None, {}))
    seconds: float = 0.0


class ShardCapturer:
    """The `Capturer` of one rank. Every rank opens one, and makes each of its calls.

    A tensor's place is known when it is first given, and its bits at the opening are read then. They come from the base
    or from the last commit; in a run that begins without a base they are all zero.
    """

    def __init__(self, bucket: Bucket, ranks: Ranks, options: CaptureOptions) -> None:
        self._ranks, self._options, self._casting = ranks, options, Casting(options.dtype)
        self._assets = options.assets if ranks.rank == 0 else None
        self._opening = Opening(bucket, ranks, replace(options, assets=self._assets))
        self._decision, self.resumed = self._opening.decision, self._opening.decision.resumed
        self._run, self._table = self._opening.run, dict(self._opening.table)
        self.next_version = self.resumed.position.version + 1 if self.resumed is not None else 0
        self.transition = Transition()
        self._tracker = ChangeTracker(self.transition, Baseline(options.own))
        self._choice, self._place = SUBSET, Place(options.baseline, options.devices)
        self._known, self._digests = self._opening.digests, dict(self._opening.digests)
        self._aliases = aliases_of(self._run.table) if self._run is not None else None

    @property
    def total(self) -> int:
        """Elements in the tensor table."""
        return sum(count(entry.shape) for entry in self._table.values())

    @property
    def model_bytes(self) -> int:
        """Bytes of one whole version."""
        return sum(entry.nbytes for entry in self._table.values())

    @property
    def baseline(self) -> Lies:
        """Where this rank's baseline lies."""
        return self._place.describe(self._tracker.baseline)

    @property
    def held_bytes(self) -> int:
        """The most memory that waiting changes can take, once folded: an increment for every element we own."""
        owned = {name: shard.shape for name, shard in self._tracker.shards.items() if shard.owned}
        return sum(count(shape) * WIDTHS[self._table[name].dtype] for name, shape in owned.items())

    @property
    def _begins_empty(self) -> bool:
        """Whether the next version begins a run from all-zero bits."""
        return self._decision.empty and self._run is None

    def capture(
        self,
        pairs: Pairs,
        *,
        step: int | None,
        metrics: Mapping[str, float] | None,
        cut: int = -1,
        stay: bool = False,
    ) -> Capture:
        """This rank's part of the next version. Every rank joins, whatever went wrong on it, so none waits in vain.

        Raises what a one-process capture raises on the rank that has the trouble, and RankFailed on the others.
        CopiesDiffer, BadDigest and MissingTensor are raised on all. After any of these no rank has moved on, and what
        each captured goes with the next good call. The `transition` stays unfinished after anything else, when the
        other ranks may have moved on.
        """
        self._choice = self._choose()
        self.transition.begin()
        found, captured = _Found(self._aliases or {}), None
        problem: BaseException | None = None
        try:
            found = self._find(pairs, step, metrics, stay=stay)
        except BaseException as error:  # an interrupt, too: the other ranks wait for this one's sum
            problem = error
        try:
            if self._run is None:
                found = self._agree(found, problem)
            if problem is None:
                try:
                    captured = self._describe(found)
                except BaseException as error:
                    problem = error
            sums = self._add_up(found, captured, problem, cut)
        except BaseException as error:
            with self.transition:
                self._forget_beginning()
            if error is problem or isinstance(error, DeltaWireError):  # what every rank knows of
                self.transition.end()
            raise
        assert captured is not None
        return self._move_on(captured, sums, found.seconds)

    def close(self) -> None:
        """Remove what was downloaded."""
        self._opening.close()

    # On this rank

    def _find(self, pairs: Pairs, step: int | None, metrics: Mapping[str, float] | None, *, stay: bool) -> "_Found":
        """Compare what this rank holds of the tensors given."""
        started = time.perf_counter()
        about, given = About.of(step, metrics), Given()
        self._casting.begin()
        self._place.begin()
        names = self._compare(pairs, given, stay=stay)
        return _Found(self._settle(names, given), names, about, time.perf_counter() - started)

    def _compare(self, pairs: Pairs, given: Given, *, stay: bool) -> set[str]:
        """Move the baseline to what is given; the names in the run."""
        trainable = {entry.name for entry in self._table.values() if entry.trainable} if self._run else None
        begins = self._begins_empty
        noting = given if self._run is None and self._opening.ties.tied is not False else None
        tensors = ties.resolved(pairs, self._aliases or {}, None if begins else self._table, noting)
        facts = (self._tracker, self._casting, self._table, trainable, self._place)
        coding = not_yet if begins else self._choice.of_shard
        comparison = Comparison(*facts, self._hold, self._prepare, coding, stay=stay)
        seen = comparison.run(tensors if begins else among(tensors, self._table))
        self._casting.settle([*seen, *seen.values()], warn=self._ranks.rank == 0)
        if begins:
            require_bare(seen)
            if self._ranks.rank == 0:
                warn_of_packed(self._table.values())
        return {*seen}

    def _hold(self, given: GivenTensor) -> Shard:
        """What this rank holds of a tensor, which enters the table of a run that begins from nothing."""
        shard = self._ranks.hold(given.alias, given.tensor)
        if self._begins_empty and given.name not in self._table:
            served = self._casting.served_as(given.name, given.tensor)
            self._table[given.name] = TensorEntry(given.name, served, shard.whole)
        return shard

    def _prepare(self, name: str, shard: Shard) -> None:
        """Have the baseline hold the bits of this shard at the opening, when it is first given."""
        if name in self._tracker.shards:
            self._keep_place(name, self._tracker.shards[name], shard)
        if name not in self._tracker.shards:
            self._tracker.seed(name, self._opening.bits(self._table[name], shard), shard)

    def _keep_place(self, name: str, known: Shard, shard: Shard) -> None:
        """Raise ShapeMismatch for another part of a tensor than this rank gave before. While the weights at the opening
        are at hand, another part begins from them again."""
        if not known.is_moved_to(shard):
            return
        if not self._opening.open:
            raise moved(name, known, shard)
        with self.transition:
            self._tracker.forget(name)

    def _settle(self, names: set[str], given: Given) -> Ties:
        """The run's aliases; of one that begins, as this rank sees it."""
        if self._aliases is not None:
            return self._aliases
        begins = self._decision.empty
        declared = ties.head_of(self._table) if begins and self._opening.ties.tied else self._opening.ties.declared
        fixed: Iterable[str] = () if begins else self._table
        return ties.settle(declared, given, {*names, *given.twins}, fixed, self._tracker.baseline.holds_alike)

    def _describe(self, found: "_Found") -> Captured:
        """The next version with this rank's file made; its digests are not known yet."""
        with self.transition:
            for name in self._tracker.shards.keys() - found.names:  # given by a publish that failed, and not by this
                self._tracker.forget(name)
        version = 1 if self._run is None and self._decision.base is not None else self.next_version
        captured = Captured(
            run=self._run or self._new_run(found.names),
            version=version,
            parent=version - 1 if version else None,
            versions=1,
            delta=Delta(self._tracker.uncovered),
            digests={},
            created=self._options.clock(),
            step=found.about.step,
            metrics=found.about.metrics,
            payloads=None,
            rank=self._ranks.rank,
            boxes=self._tracker.baseline.boxes,
        )
        assets = asset_payloads(self._assets) if self._assets is not None and version == 0 else {}
        captured = replace(captured, payloads=assets | encode(captured, self._tracker.coded))
        on_device = self._tracker.baseline.device_bytes > 0
        return replace(captured, reason=self._choice.why(captured, on_device=on_device))

    def _new_run(self, names: set[str]) -> Run:
        table = (msgspec.structs.replace(entry, trainable=entry.name in names) for entry in self._table.values())
        listed, begun = with_aliases(table, self._aliases or {}), self._decision
        facts = (begun.run, listed, self._options.clock(), begun.base, begun.supersedes, self._options.compactors)
        return in_its_format(Run(*facts), self._decision.codecs)

    def _forget_beginning(self) -> None:
        """A run that could not begin without a base begins again: nothing of it is anywhere."""
        if self._begins_empty:
            for name in list(self._tracker.shards):
                self._tracker.forget(name)
            self._table, self._known, self._aliases = {}, {}, None

    def _merge(self, aliases: Ties, names: set[str]) -> None:
        """Let go of what is a further name of another tensor."""
        self._tracker.merge(aliases, names)
        for alias in aliases:
            for known in (self._table, self._known, self._digests):
                known.pop(alias, None)
        self._aliases = aliases

    # All ranks together

    def _choose(self) -> Choice:
        """What rank 0 chooses for all: it alone hears the replicas."""
        listed = self._run.may_use if self._run is not None else self._decision.codecs
        return self._ranks.from_first(self._options.choose) if "class" in listed else SUBSET

    def _agree(self, found: "_Found", problem: BaseException | None) -> "_Found":
        """Agree with all ranks what a run that begins is of, which the length of every later sum depends on.

        What was found, under the names that all ranks agreed on.
        """
        number = mark(self._table, found.names, found.aliases, None)
        require_alike(self._ranks.add_up(marks_of(self._ranks.rank, self._ranks.size, number), problem))
        with self.transition:
            self._merge(found.aliases, found.names)
        if not self._known:
            self._known = self._opening.add_up_digests(self._table, problem)
        return replace(found, names={found.aliases.get(name, name) for name in found.names})

    def _add_up(self, found: "_Found", captured: Captured | None, problem: BaseException | None, cut: int) -> Ballot:
        """The one sum of a publish, checked."""
        ranks, tensors = self._ranks.size, len(self._known)
        said = self._ballot(found.names, captured, cut) if captured is not None else Ballot.blank(ranks, tensors)
        sums = Ballot.unpack(self._ranks.add_up(said.pack(), problem), ranks, tensors)
        require_alike(sums.marks)
        due = [name if name in found.names else None for name in self._table]
        sums.require_whole(due, self._tracker.shards, self._known, where=self._decision.where)
        return sums

    def _ballot(self, names: set[str], captured: Captured, cut: int) -> Ballot:
        """What this rank says of the version that it captured."""
        marks = marks_of(self._ranks.rank, self._ranks.size, mark(self._table, names, {}, captured.step))
        facts = captured.delta.changed, captured.payload_bytes, cut if self._ranks.rank == 0 else -1
        return Ballot(marks, *facts, *digests_of(self._tracker, self._table, names))

    def _move_on(self, captured: Captured, sums: Ballot, seconds: float) -> Capture:
        """Every rank has captured the version: number it, and let go of the change. Nothing here can fail."""
        before, run = dict(self._known), captured.run
        owned = zip(run.table, sums.owned.tolist(), strict=True)
        digests = dict(self._digests or before) | {entry.name: value for entry, value in owned if entry.trainable}
        versions = [replace(captured, digests=digests)]
        if self._run is None and self._decision.base is not None:
            zero = replace(versions[0], version=0, parent=None, delta=Delta(), digests=before, payloads={}, boxes={})
            versions = [zero, *(versions if sums.changed else [])]
        self._run, self._digests, self.next_version = run, digests, versions[-1].version + 1
        self._tracker.cover()
        self._table = {entry.name: entry for entry in run.table}
        self.close()
        changed = sums.changed if versions[-1].parent is not None else self.total
        return Capture(tuple(versions), seconds, changed, sums.wire_bytes, sums.cut)
