"""From a rank's shards to its part of the next version: every rank compares what it holds, one sum makes it a version.

What `capture` does for one process, for one rank of many: nothing is gathered; a rank keeps the bits of its own boxes.
Either every rank has captured the next version, or none has, and each keeps what it found for the next try.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from blake3 import blake3

from deltawire.buckets.base import Bucket
from deltawire.errors import BadDigest, CopiesDiffer, DeltaWireError, MissingTensor, ShapeMismatch
from deltawire.format import checkpoint
from deltawire.prepare.names import require_bare
from deltawire.publish import ties
from deltawire.publish.baseline import Baseline, Transition, among, require
from deltawire.publish.capture import About, Capture, about_of, require_all, require_due, warn_of_packed
from deltawire.publish.dtypes import Casting
from deltawire.publish.pending import Captured, encode
from deltawire.publish.sharded.boxes import Shard
from deltawire.publish.sharded.opening import Opening
from deltawire.publish.sharded.ranks import Ranks, Sums
from deltawire.publish.ties import Given, Ties, head_of, settle
from deltawire.runlog.keys import anchor_hash, anchor_prefix
from deltawire.runlog.records import Run, aliases_of, in_its_format, with_aliases
from deltawire.weights.bits import WIDTHS, count
from deltawire.weights.delta import Delta, TensorDelta
from deltawire.weights.digest import MODULUS
from deltawire.weights.table import TensorEntry


class ShardCapturer:
    """One rank's baseline, and its change that no version covers yet. Opening and capturing are done by every rank.

    A tensor's box is known when it is first given; its bits at the opening position are read then: from the base or
    from the last commit, or they are all zero in a run that begins without a base.
    """

    def __init__(
        self,
        bucket: Bucket,
        ranks: Ranks,
        *,
        base: str | Path | None,
        dtype: str | Mapping[str, str],
        assets: str | Path | None,
        clock: Callable[[], float],
        supersede: bool = False,
        compactors: tuple[str, ...] = (),
    ) -> None:
        self._ranks, self._casting, self._clock, self._compactors = ranks, Casting(dtype), clock, compactors
        self._assets = Path(assets) if assets is not None and ranks.rank == 0 else None
        self._opening = Opening(bucket, ranks, base=base, assets=self._assets, supersede=supersede)
        self._decision = self._opening.decision
        self.resumed, self.resumed_hash = self._decision.resumed, self._decision.hash
        self._run, self._table = self._opening.run, dict(self._opening.table)
        self._next = self.resumed.version + 1 if self.resumed is not None else 0
        self._baseline = Baseline()
        self._shards: dict[str, Shard] = {}
        self._seeded: dict[str, int] = {}
        self._partial: dict[str, TensorDelta] = {}
        self.transition = Transition()
        self._known = self._opening.digests
        self._digests = dict(self._known)
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
    def held_bytes(self) -> int:
        """The most memory that this rank's waiting changes can take, once folded: a step for every element it owns."""
        owned = {name: shard.box for name, shard in self._shards.items() if shard.owned}
        return sum(count(box.shape) * WIDTHS[self._table[name].dtype] for name, box in owned.items())

    def capture(
        self, pairs: Iterable[tuple[str, Any]], *, step: int | None, metrics: Mapping[str, float] | None, cut: int = -1
    ) -> Capture:
        """This rank's part of the next version. Every rank joins, whatever went wrong on it, so none waits in vain.

        Raises what a one-process capture raises on the rank that has the trouble, and RankFailed on the others;
        CopiesDiffer, BadDigest and MissingTensor on all. Whatever of these is raised, no rank has moved on, and what
        each captured goes with the next good call; the `transition` stays unfinished after anything else, when the
        other ranks may have moved on. It is the caller's to end, once it has what was captured.
        """
        self.transition.begin()
        started = time.perf_counter()
        about: About = (None, {})
        named: set[str] = set()
        given, aliases = Given(), self._aliases or {}
        captured: Captured | None = None
        problem: BaseException | None = None
        try:
            about = about_of(step, metrics)
            self._casting.begin()
            named = self._compare(pairs, given)
            aliases = self._settle(named, given)
            seconds = time.perf_counter() - started
        except BaseException as error:  # an interrupt, too: the other ranks wait for this one's sum
            problem = error
        try:
            if self._run is None:
                named = self._begin(problem, named, aliases)
            if problem is None:
                captured, problem = self._described(about, named)
            sums = self._add_up(problem, named, captured, cut)
        except BaseException as error:
            with self.transition:
                self._forget_beginning()
            if error is problem or isinstance(error, DeltaWireError):  # what every rank knows of
                self.transition.end()
            raise
        assert captured is not None
        return self._move_on(captured, about, sums, seconds)

    def close(self) -> None:
        """Remove what was downloaded."""
        self._opening.close()

    # On this rank

    def _compare(self, pairs: Iterable[tuple[str, Any]], given: Given) -> set[str]:
        trainable = {entry.name for entry in self._table.values() if entry.trainable} if self._run else None
        begins, seen = self._decision.empty and self._run is None, dict[str, str]()
        noting = given if self._run is None and self._opening.tied is not False else None
        resolved = ties.resolved(pairs, self._aliases or {}, None if begins else self._table, noting)
        for name, (alias, tensor) in resolved if begins else among(resolved, self._table):
            shard = self._ranks.hold(alias, tensor)
            if begins and name not in self._table:
                self._table[name] = TensorEntry(name, self._casting.served_as(name, tensor), shard.box.whole)
            if seen.get(name, alias) != alias:
                bits = self._casting.cast(name, tensor, self._table[name].dtype, shard=shard.tensor)
                self._baseline.require_alike(alias, name, bits)
                continue
            require(name, shard.box.whole, self._table)
            require_due(name, seen, trainable)
            self._take(name, tensor, shard)
            seen[name] = alias
        require_all(seen, trainable)
        self._casting.settle([*seen, *seen.values()], warn=self._ranks.rank == 0)
        if self._decision.empty and self._run is None:
            require_bare(seen)
            if self._ranks.rank == 0:
                warn_of_packed(self._table.values())
        return {*seen}

    def _take(self, name: str, tensor: Any, shard: Shard) -> None:
        """Move the baseline to what this rank holds of a tensor, and keep the change if it is ours to publish."""
        entry = self._table[name]
        if name in self._shards:
            self._keep_place(name, self._shards[name], shard)
        if name not in self._shards:
            self._baseline.seed(name, self._opening.bits(entry, shard.box), shard.box)
            self._seeded[name] = self._baseline.digests[name]
            self._shards[name] = replace(shard, tensor=None)
        change = self._baseline.compare(name, self._casting.cast(name, tensor, entry.dtype, shard=shard.tensor))
        total = self._partial[name] + change if name in self._partial else change
        with self.transition:
            if shard.owned:
                self._partial[name] = total
            self._baseline.advance(name, change)

    def _keep_place(self, name: str, known: Shard, shard: Shard) -> None:
        """Raise ShapeMismatch for another part of a tensor than this rank gave before, and for a whole tensor where it
        gave a DTensor: on one rank, or where ranks hold copies, the two are one box, and FSDP2's copy is an old one.
        While the weights at the opening position are at hand, another part begins from them anew."""
        if known.sharded and not shard.sharded:
            before, now = "a DTensor", "a whole tensor"
        elif (known.box, known.owned) != (shard.box, shard.owned):
            before, now = (f"{list(box.shape)} at {list(box.offset)}" for box in (known.box, shard.box))
        else:
            return
        if not self._opening.open:
            raise ShapeMismatch(
                f"{name}: this rank gave {before} before, and now {now}. Publish what the model shows after "
                "`reshard()` of every FSDPModule, as checkpoint_tensors(model) of deltawire.trainers.state does; a "
                "model that was sharded another way needs a new Publisher, which reads the new parts from the last "
                "commit"
            )
        with self.transition:
            self._forget(name)

    def _described(self, about: About, named: set[str]) -> tuple[Captured | None, BaseException | None]:
        """The next version, or what is wrong on this rank: the others must hear of it."""
        try:
            return self._describe(about, named), None
        except BaseException as error:
            return None, error

    def _describe(self, about: About, named: set[str]) -> Captured:
        """The next version with this rank's file made; its digests are not known yet."""
        with self.transition:
            for name in self._shards.keys() - named:  # by a publish that failed, and not by this one
                self._forget(name)
        table = (msgspec.structs.replace(entry, trainable=entry.name in named) for entry in self._table.values())
        listed, begun = with_aliases(table, self._aliases or {}), self._decision
        run = self._run or in_its_format(
            Run(begun.run, listed, self._clock(), begun.base, begun.supersedes, self._compactors)
        )
        on_base = self._run is None and self._decision.base is not None
        version = 1 if on_base else self._next
        captured = Captured(
            run=run,
            version=version,
            parent=version - 1 if version else None,
            versions=1,
            delta=Delta(self._partial),
            digests={},
            created=self._clock(),
            step=about[0],
            metrics=about[1],
            payloads=None,
            rank=self._ranks.rank,
            boxes=self._baseline.boxes,
        )
        return replace(captured, payloads=self._asset_files(version) | encode(captured))

    def _asset_files(self, version: int) -> dict[str, bytes | Path]:
        """Config and tokenizer files, as payloads of version 0."""
        if version or self._assets is None:
            return {}
        files = {path.name: path.read_bytes() for path in checkpoint.assets(self._assets)}
        prefix = anchor_prefix(0, anchor_hash({name: blake3(data).hexdigest() for name, data in files.items()}))
        return {f"{prefix}/{name}": data for name, data in files.items()}

    def _forget(self, name: str) -> None:
        self._baseline.forget(name)
        for kept in (self._shards, self._seeded, self._partial):
            kept.pop(name, None)

    def _forget_beginning(self) -> None:
        """A run that could not begin without a base begins anew: nothing of it is anywhere."""
        if self._run is None and self._decision.empty:
            for name in list(self._shards):
                self._forget(name)
            self._table, self._known, self._aliases = {}, {}, None

    def _settle(self, named: set[str], given: Given) -> Ties:
        """The run's aliases; of one that begins, as this rank sees it."""
        if self._aliases is not None:
            return self._aliases
        begun = self._decision.empty
        declared = head_of(self._table) if begun and self._opening.tied else self._opening.declared
        fixed: Iterable[str] = () if begun else self._table
        return settle(declared, given, {*named, *given.twins}, fixed, self._baseline.holds_alike)

    def _merge(self, aliases: Ties, named: set[str]) -> None:
        """Let go of what is a further name of another tensor; where only that name was given, it was that tensor."""
        for alias, name in aliases.items():
            if alias in named and name not in named:
                self._forget(name)
                self._baseline.rename(alias, name)
                self._shards[name], self._seeded[name] = self._shards.pop(alias), self._seeded.pop(alias)
                if alias in self._partial:
                    self._partial[name] = self._partial.pop(alias)
            self._forget(alias)
            for known in (self._table, self._known, self._digests):
                known.pop(alias, None)
        self._aliases = aliases

    # All ranks together

    def _begin(self, problem: BaseException | None, named: set[str], aliases: Ties) -> set[str]:
        """Agree with all ranks what a run that begins is of, which the length of every later sum depends on. The
        canonical names of what was given."""
        marks = self._ranks.add_up(self._mark(named, None, aliases), problem)
        self._require_alike(marks)
        with self.transition:
            self._merge(aliases, named)
        if not self._known:
            self._known = self._opening.add_up_digests(self._table, problem)
        return {aliases.get(name, name) for name in named}

    def _mark(self, named: set[str], step: int | None, aliases: Ties | None = None) -> Sums:
        """What this rank says of the tensors it was given: one number in its place, zero in the others'. A step that is
        not that of the others tells of a publish too many, after which ranks would send different policies as one."""
        facts = "".join(f"{entry.name}\0{entry.dtype}\0{entry.shape}\n" for entry in self._table.values())
        said = f"{facts}\0{sorted(named)}\0{sorted((aliases or {}).items())}\0{step}".encode()
        marks = np.zeros(self._ranks.size, np.uint64)
        marks[self._ranks.rank] = int.from_bytes(blake3(said).digest()[:8], "little")
        return marks

    def _require_alike(self, marks: Sums) -> None:
        if other := [rank for rank in range(self._ranks.size) if marks[rank] != marks[0]]:
            raise MissingTensor(
                f"rank {', '.join(map(str, other))} gave other tensors (names, order, dtypes or shapes) or "
                "another step than rank 0: every rank makes the same calls, for its shards of one model"
            )

    def _add_up(self, problem: BaseException | None, named: set[str], captured: Captured | None, cut: int) -> Sums:
        """The one sum of a publish, checked. Its first numbers: who named what, elements changed, bytes, the cut."""
        size, width = self._ranks.size, len(self._known)
        numbers, columns = np.zeros(size + 3, np.uint64), np.zeros((3, width), np.uint64)
        if problem is None and captured is not None:
            numbers[:size] = self._mark(named, captured.step)
            numbers[size:] = captured.delta.changed, captured.payload_bytes, cut + 1 if self._ranks.rank == 0 else 0
            for number, name in enumerate(self._table):
                if name in named:
                    digest, owned = self._baseline.digests[name], self._shards[name].owned
                    columns[:, number] = self._seeded[name] if owned else 0, digest if owned else 0, digest
        sums = self._ranks.add_up(np.concatenate([numbers, columns.reshape(-1)]), problem)
        self._require_alike(sums[:size])
        self._require_whole(sums[size + 3 :].reshape(3, width), named)
        return sums[size:]

    def _require_whole(self, columns: Sums, named: set[str]) -> None:
        """Whether the owned boxes tile every tensor, and all copies of a box agree. The same on every rank."""
        for number, name in enumerate(self._table):
            if name not in named:
                continue
            seeded, owned, all_copies = (int(value) for value in columns[:, number])
            if seeded != self._known[name]:
                raise BadDigest(
                    f"{name}: the shards of all ranks do not make the tensor that {self._where()} has; was it altered "
                    "since, or is the tensor on only some of the ranks?"
                )
            if all_copies != owned * self._shards[name].copies % MODULUS:
                raise CopiesDiffer(f"{name}: ranks that hold copies of the same elements hold different bits")

    def _where(self) -> str:
        return str(self._decision.resumed or (self._decision.base and self._decision.base.source) or "the model")

    def _move_on(self, captured: Captured, about: About, sums: Sums, seconds: float) -> Capture:
        """Every rank has captured the version: number it, and let go of the change. Nothing here can fail."""
        changed, wire_bytes, cut = (int(value) for value in sums[:3])
        columns = sums[3:].reshape(3, -1)
        before, run = dict(self._known), captured.run
        digests = dict(self._digests or before)
        for number, entry in enumerate(run.table):
            if entry.trainable:
                digests[entry.name] = int(columns[1, number])
        versions = [replace(captured, digests=digests)]
        if self._run is None and self._decision.base is not None:
            zero = replace(versions[0], version=0, parent=None, delta=Delta(), digests=before, payloads={}, boxes={})
            versions = [zero, *(versions if changed else [])]
        self._run, self._digests, self._next, self._partial = run, digests, versions[-1].version + 1, {}
        self._table = {entry.name: entry for entry in run.table}
        self.close()
        shown = changed if versions[-1].parent is not None else self.total
        return Capture(versions, seconds, shown, wire_bytes, cut - 1)
