"""Any version as a full Hugging Face checkpoint folder: the anchor's files, the deltas applied to them in place."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from deltawire.buckets.base import Bucket
from deltawire.errors import AlreadyExists, BadDigest, Forked, Gap
from deltawire.format import checkpoint
from deltawire.format.checkpoint import Checkpoint
from deltawire.read.changes import Change, Update
from deltawire.read.mirror import Mirror, building, held, unfinished
from deltawire.read.subscriber import Subscriber
from deltawire.runlog.figures import figures
from deltawire.runlog.records import Position
from deltawire.weights.bits import Bits
from deltawire.weights.table import aliases_of


@dataclass(frozen=True, slots=True)
class MaterializeReport:
    """A version written as a checkpoint folder: how many deltas were applied on the anchor, bytes fetched, seconds."""

    position: Position
    folder: Path
    deltas: int
    fetched_bytes: int
    seconds: float

    def as_metrics(self) -> dict[str, float]:
        """Its numbers as `deltawire/…`, for a trainer's logs."""
        return figures(self)


def materialize(
    bucket: Bucket,
    out_dir: Path | str,
    version: int | None = None,
    *,
    base: Path | str | None = None,
    trusted: Iterable[str | Path] = (),
    on_update: Callable[[Update], None] = lambda update: None,
) -> MaterializeReport:
    """Write a version (the newest by default) as a checkpoint folder that vLLM and transformers load.

    Every tensor's digest is recomputed and compared with the commit before the folder appears under its name, all at
    once. Costs one delta of memory. A folder that already holds this position is left as it is. One that holds another
    version of the run is moved by what lies between, through a journal. So a kill leaves no mixture.

    `trusted` are public keys, or files of them, one of which must have signed every record.

    Raises AlreadyExists for a folder that holds anything else, or a version from which nothing leads to this one;
    BadDigest, OutOfSpace, and what Subscriber.updates raises.
    """
    started, out = time.monotonic(), Path(out_dir)
    with Subscriber(bucket, base=base, trusted=trusted) as subscriber:
        target = subscriber.latest() if version is None else subscriber.position_at(version)
        if (here := held(out)) is not None and here.run == target.run:
            return _move(subscriber, out, target, started)
        with building(out, target) as work:
            updates = _build(subscriber, work, target, on_update)
    return MaterializeReport(target, out, len(updates) - 1, sum(updates), time.monotonic() - started)


def _move(subscriber: Subscriber, out: Path, target: Position, started: float) -> MaterializeReport:
    deltas = fetched = 0
    if held(out) != target or unfinished(out):
        with Mirror(out, subscriber.run.table) as mirror:
            change = _apply(subscriber, mirror, target, out)
            deltas, fetched = change.payloads, change.wire_bytes
    return MaterializeReport(target, out, deltas, fetched, time.monotonic() - started)


def _apply(subscriber: Subscriber, mirror: Mirror, target: Position, out: Path) -> Change:
    """Move the folder by the first change that leads to the target's digests: a fold may be a stranger's."""
    while True:
        change = _way(subscriber, mirror, target, out)
        try:
            mirror.apply(change.delta, change.position)
            return change
        except BadDigest:
            if not subscriber.pass_over(change):
                raise


def _way(subscriber: Subscriber, mirror: Mirror, target: Position, out: Path) -> Change:
    try:
        return subscriber.change(mirror.position, target.version, weights=mirror.weights, anchors=False)
    except (Gap, Forked):
        problem = f"{out} holds {mirror.position}, from which nothing leads to {target}"
        raise AlreadyExists(f"{problem}; name another folder or remove it") from None


def _build(subscriber: Subscriber, work: Path, target: Position, on_update: Callable[[Update], None]) -> list[int]:
    fetched: list[int] = []
    weights: dict[str, Bits] = {}
    for update in subscriber.updates(until=target.version, weights=weights):
        if update.delta is None:
            assert update.anchor is not None
            files = checkpoint.files(update.anchor.folder)
            checkpoint.copy(files, work, without=aliases_of(subscriber.run.table))
            built = Checkpoint(work, writable=True)
            weights.update(built)
        else:
            update.delta.apply_(weights)
        fetched.append(update.wire_bytes)
        on_update(update)
    built.require_digests(subscriber.digests_at(target.version), where=str(target))
    built.flush()
    return fetched
