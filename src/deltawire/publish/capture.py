"""From the trainer's tensors to the next version: cast, compare, number. Needs no network once opened."""

import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from deltawire.buckets.atomic import file_system_errors
from deltawire.buckets.base import Bucket
from deltawire.buckets.verified import hash_file
from deltawire.errors import BadDigest, BadSignature, MissingTensor, NotFound, UnknownTensor, some
from deltawire.format import checkpoint
from deltawire.format.checkpoint import Checkpoint
from deltawire.prepare.names import require_bare
from deltawire.publish import ties
from deltawire.publish.baseline import Baseline, Transition, among
from deltawire.publish.dtypes import Casting
from deltawire.publish.pending import Captured, encode
from deltawire.publish.resuming import require_same_adapter
from deltawire.read.bases import open_base, resolve_base
from deltawire.read.subscriber import Subscriber
from deltawire.runlog import log
from deltawire.runlog.bounds import require_assets
from deltawire.runlog.keys import anchor_hash, anchor_prefix
from deltawire.runlog.records import BaseCheckpoint, Position, Run, aliases_of, in_its_format, with_aliases
from deltawire.weights.bits import Bits, count
from deltawire.weights.delta import Delta, TensorDelta
from deltawire.weights.digest import root as root_of
from deltawire.weights.table import TensorEntry

PACKED = ("U8", "I8", "I32")
"""dtypes that quantized weights are packed in"""
About = tuple[int | None, Mapping[str, float]]
"""what the trainer says of a version: its step and metrics"""


class Capture(NamedTuple):
    """What one publish captured: the next version (a run's first capture on a base can make two), the seconds spent
    comparing, how many elements changed, and the bytes of the newest version's files, whoever holds them.

    Of a sharded job's capture, `cut` is the newest version that rank 0 has begun to send, as all ranks know it by now;
    nothing folds into it any more.
    """

    versions: list[Captured]
    compare_seconds: float
    changed: int
    wire_bytes: int
    cut: int = -1


class Capturer:
    """Holds the baseline and the change no version covers yet; every capture moves both or neither.

    Opens where the bucket stands: a run that is already there is continued from its last commit.
    """

    def __init__(
        self,
        bucket: Bucket,
        spool: Path,
        *,
        base: str | Path | None,
        dtype: str | Mapping[str, str],
        assets: str | Path | None,
        clock: Callable[[], float],
        supersede: bool = False,
        compactors: tuple[str, ...] = (),
    ) -> None:
        self._compactors = compactors
        self._supersedes: Position | None = None
        self.resumed_hash: str | None = None
        self._spool, self._casting, self._clock = spool, Casting(dtype), clock
        self._assets = Path(assets) if assets is not None else None
        self._run: Run | None = None
        self._baseline = Baseline()
        self._partial: dict[str, TensorDelta] = {}
        self.transition = Transition()
        self._declared: ties.Ties = {}
        self._aliases: ties.Ties | None = None
        self._next = 0
        self._base: BaseCheckpoint | None = None
        self._base_digests: dict[str, int] = {}
        self.resumed: Position | None = None
        if supersede:
            self._supersedes = newest(bucket)
        else:
            self.resumed = self._resume(bucket, base)
        if self.resumed is None and self._assets is not None:
            require_usable(self._assets)
        if self.resumed is None and base is not None:
            self._base = resolve_base(str(base))
            folder = open_base(self._base)
            self._baseline = _seeded(Checkpoint(folder))
            self._base_digests = dict(self._baseline.digests)
            self._declared = ties.in_file(folder, self._baseline.as_mapping(), self._base_digests)

    @property
    def total(self) -> int:
        """Elements in the tensor table."""
        return sum(count(entry.shape) for entry in self._run.table) if self._run else 0

    @property
    def model_bytes(self) -> int:
        """Bytes of one whole version."""
        return sum(entry.nbytes for entry in self._run.table) if self._run else 0

    @property
    def held_bytes(self) -> int:
        """The most memory that waiting changes can take, once folded: a step for every element."""
        return self.model_bytes

    def capture(
        self, pairs: Iterable[tuple[str, Any]], *, step: int | None, metrics: Mapping[str, float] | None, cut: int = -1
    ) -> Capture:
        """Compare, and number what changed. `cut` is for the ranks of a sharded job.

        Only the last statement moves the numbers on and lets go of the change, so an error keeps both. The `transition`
        that it begins is the caller's to end, once it has what was captured.
        Raises UnknownTensor, MissingTensor, ShapeMismatch, DtypeMismatch, OutOfSpace; a change captured before the
        error stays in the baseline and in what the next version covers.
        """
        started = time.perf_counter()
        about = about_of(step, metrics)
        self._casting.begin()
        if self._run is None and self._base is None:
            first = self._begin(pairs, about)
            return Capture([first], time.perf_counter() - started, self.total, first.payload_bytes)
        trainable = {entry.name for entry in self._run.table if entry.trainable} if self._run else None
        given = ties.Given()
        seen = self._compare(pairs, trainable, given)
        require_all(seen, trainable)
        self._casting.settle([*seen, *seen.values()])
        seconds = time.perf_counter() - started
        run = self._run or self._begin_on_base(seen, given)
        versions = [] if self._run else [self._describe(run, 0, about, digests=self._base_digests, payloads={})]
        delta = Delta(self._partial)
        if delta or not versions:
            captured = self._describe(run, self._next + len(versions), about, delta=delta)
            versions.append(replace(captured, payloads=encode(captured)))
        self.transition.begin()
        self._run, self._next, self._partial = run, versions[-1].version + 1, {}
        changed = delta.changed if versions[-1].parent is not None else self.total
        return Capture(versions, seconds, changed, versions[-1].payload_bytes)

    def close(self) -> None:
        """Nothing is held but memory."""

    def _compare(
        self, pairs: Iterable[tuple[str, Any]], trainable: set[str] | None, given: ties.Given
    ) -> dict[str, str]:
        """Move the baseline to what is given; by its name there, the name each tensor had."""
        held, seen = self._baseline.as_mapping(), dict[str, str]()
        resolved = ties.resolved(pairs, self._aliases or {}, held, given if self._run is None else None)
        for name, (alias, tensor) in among(resolved, held):
            if seen.get(name, alias) != alias:
                bits = self._casting.cast(name, tensor, self._baseline[name].dtype)
                self._baseline.require_alike(alias, name, bits)
                continue
            self._baseline.require(name, tuple(tensor.shape))
            require_due(name, seen, trainable)
            change = self._baseline.compare(name, self._casting.cast(name, tensor, self._baseline[name].dtype))
            total = self._partial[name] + change if name in self._partial else change
            with self.transition:
                self._partial[name] = total
                self._baseline.advance(name, change)
            seen[name] = alias
        return seen

    def _begin(self, pairs: Iterable[tuple[str, Any]], about: About) -> Captured:
        """A run's first version, as an anchor. Nothing counts as captured before its files are written."""
        baseline, given, tied = Baseline(), ties.Given(), ties.ties_words(self._assets)
        for name, tensor in pairs:
            require_due(name, baseline.digests, None)
            if tied is not False:  # a config that unties them is that of servers which hold two
                given.note(name, tensor)
            baseline.seed(name, self._casting.cast(name, tensor, self._casting.served_as(name, tensor)))
        require_all(baseline.digests, None)
        self._casting.settle(baseline.digests)
        require_bare(baseline.digests)
        warn_of_packed(baseline.table(()))
        names = list(baseline.digests)
        aliases = ties.settle(ties.head_of(names) if tied else {}, given, names, (), baseline.holds_alike)
        for alias in aliases:
            baseline.forget(alias)
        run = self._new_run(with_aliases(baseline.table(baseline.digests), aliases), None)
        payloads = self._write_anchor(run.table, baseline)
        captured = self._describe(run, 0, about, digests=baseline.digests, payloads=payloads)
        self.transition.begin()
        self._baseline, self._run, self._next, self._aliases = baseline, run, 1, aliases
        return captured

    def _begin_on_base(self, seen: Mapping[str, str], given: ties.Given) -> Run:
        """A run whose version 0 is the base by reference."""
        trainable = {*seen}
        with self.transition:
            for name in self._partial.keys() - trainable:  # named by a publish that failed, and not by this one
                self._baseline.advance(name, -self._partial.pop(name))
        if self._aliases is None:
            named, fixed = {*trainable, *given.twins}, self._baseline.digests
            self._aliases = ties.settle(self._declared, given, named, fixed, self._baseline.holds_alike)
        with self.transition:
            self._merge(self._aliases, trainable)
        trainable = {self._aliases.get(name, name) for name in trainable}
        return self._new_run(with_aliases(self._baseline.table(trainable), self._aliases), self._base)

    def _merge(self, aliases: ties.Ties, named: set[str]) -> None:
        """Let go of what is a further name of another tensor; where only that name was given, it was that tensor."""
        for alias in aliases.keys() & self._baseline.digests.keys():
            change, name = self._partial.pop(alias, None), aliases[alias]
            if change is not None and name not in named:
                self._partial[name] = change
                self._baseline.advance(name, change)
            self._baseline.forget(alias)
            del self._base_digests[alias]

    def _new_run(self, table: tuple[TensorEntry, ...], base: BaseCheckpoint | None) -> Run:
        run = Run(secrets.token_hex(8), table, self._clock(), base, self._supersedes, self._compactors)
        return in_its_format(run)

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
        return Captured(
            run=run,
            version=version,
            parent=version - 1 if version else None,
            versions=1,
            delta=delta or Delta(),
            digests=dict(digests or self._baseline.digests),
            created=self._clock(),
            step=about[0],
            metrics=about[1],
            payloads=payloads,
        )

    def _write_anchor(self, table: tuple[TensorEntry, ...], baseline: Baseline) -> dict[str, bytes | Path]:
        """The baseline as checkpoint files in the spool, beside the assets; by key below the run. Raises NotFound for
        an adapter without its config, which nothing could load."""
        folder = self._spool / "anchor"
        shutil.rmtree(folder, ignore_errors=True)
        with file_system_errors(f"{folder} (TMPDIR chooses another disk)"):
            folder.mkdir()
        if self._assets is not None:
            checkpoint.copy_assets(self._assets, folder)
        if checkpoint.is_adapter(table) and not (folder / checkpoint.ADAPTER_CONFIG).is_file():
            raise NotFound(
                f"these tensors are named as PEFT names an adapter's, and assets={self._assets} holds no "
                f"{checkpoint.ADAPTER_CONFIG}: pass the folder that deltawire.trainers.lora.save_config wrote, or "
                "publish merged weights under the model's own names"
            )
        checkpoint.write(folder, table, baseline.as_mapping())
        files = sorted(folder.iterdir())
        prefix = anchor_prefix(0, anchor_hash({path.name: hash_file(path) for path in files}))
        return {f"{prefix}/{path.name}": path for path in files}

    def _resume(self, bucket: Bucket, base: str | Path | None) -> Position | None:
        """Rebuild the baseline from the last commit of the run that is already there."""
        if not holds_run(bucket):
            return None
        near = near_base(base)
        with Subscriber(bucket, base=near) as subscriber:
            position = newest_of(subscriber)
            require_same_adapter(subscriber, self._assets)
            table = subscriber.run.table
            while True:
                change = subscriber.change(None, position.version)
                assert change.anchor is not None
                self._baseline = _seeded({entry.name: change.anchor[entry.name] for entry in table})
                for name, tensor in change.delta.items():
                    self._baseline.advance(name, tensor)
                if root_of(table, self._baseline.digests) == position.root:
                    break
                if subscriber.pass_over(change):
                    continue
                subscriber.digests_at(position.version)  # says so if it is the record that is damaged
                raise BadDigest(f"{bucket.url}: what was fetched of {position} is not what was committed; try again")
            self._run, self._next, self._aliases = subscriber.run, position.version + 1, aliases_of(table)
            self.resumed_hash = subscriber.chain.settled(position.version).hash
            return position


def require_due(name: str, seen: Container[str], trainable: Container[str] | None) -> None:
    """Raise UnknownTensor for a tensor that this publish gave already, or that is not among the run's trainable."""
    if name in seen:
        raise UnknownTensor(f"{name!r} was given twice")
    if trainable is not None and name not in trainable:
        raise UnknownTensor(f"{name!r} is frozen in this run: its first publish did not name it")


def warn_of_packed(table: Iterable[TensorEntry]) -> None:
    """Warn of matrices of integers in a run that begins without a base: most likely quantized weights."""
    packed = [entry for entry in table if entry.dtype in PACKED and len(entry.shape) > 1]
    if packed:
        named = some(f"{entry.name} ({entry.dtype} {list(entry.shape)})" for entry in packed)
        warnings.warn(
            f"{len(packed)} tensors of this run hold integers: {named}. Quantized weights (bitsandbytes, GPTQ) go bit "
            "for bit, and without what they are unpacked by, which is no parameter: publish them dequantized, or begin "
            "the run with Publisher(base=…), the checkpoint that holds them so",
            stacklevel=2,
        )


def require_all(seen: Iterable[str], trainable: set[str] | None) -> None:
    """Raise MissingTensor unless a publish gave something, and every one of the run's trainable tensors."""
    if not (given := set(seen)):
        raise MissingTensor("no tensors were given: pass model.named_parameters()")
    if trainable is not None and (missing := trainable - given):
        raise MissingTensor(
            f"{len(missing)} tensors of this run were not given: {some(sorted(missing))}; every publish names exactly "
            "the tensors the first one did"
        )


def holds_run(bucket: Bucket) -> bool:
    """Whether anything is published."""
    try:
        log.current_run(bucket)
    except NotFound:
        return False
    return True


def require_signer(bucket: Bucket, signer: str | None) -> None:
    """Raise BadSignature when the run that is there began with a key, and `signer`, a public key, is another or none:
    what is committed then is refused by every reader who trusts that key."""
    try:
        run = log.read_run(bucket, log.current_run(bucket))
    except NotFound:
        return
    if run.signer not in (None, signer):
        ours = "no signing_key was given" if signer is None else f"signing_key= is {signer[:16]}…"
        raise BadSignature(
            f"{bucket.url}: run {run.run} is signed by {run.signer[:16]}…, and {ours}: followers that --trust that key "
            'would be left behind. Give its file to Publisher(signing_key=…); Publisher(run="supersede") begins a new '
            "run without it"
        )


def require_usable(assets: Path) -> None:
    """Raise NotFound for a folder of assets that is not there, and TooLarge for one whose files no reader would fetch:
    now, and not at the first publish."""
    require_assets({path.name: path.stat().st_size for path in checkpoint.assets(assets)}, str(assets))


def near_base(base: str | Path | None) -> str | Path | None:
    """The base checkpoint where it is a folder on this host."""
    return base if base is not None and Path(base).is_dir() else None


def newest_of(subscriber: Subscriber) -> Position:
    """The newest committed position, looked up twice, as either look may be stale."""
    return max(subscriber.latest(), subscriber.latest(), key=lambda position: position.version)


def newest(bucket: Bucket) -> Position | None:
    """Where the bucket's run stands; None while nothing is published."""
    with Subscriber(bucket) as subscriber:
        try:
            return subscriber.chain.settled(subscriber.latest().version).record.position
        except NotFound:
            return None


def _seeded(weights: Mapping[str, Bits]) -> Baseline:
    baseline = Baseline()
    for name in weights:
        baseline.seed(name, weights[name])
    return baseline


def about_of(step: int | None, metrics: Mapping[str, float] | None) -> About:
    """A step and metrics as numbers of our own."""
    return None if step is None else int(step), {name: float(value) for name, value in (metrics or {}).items()}
