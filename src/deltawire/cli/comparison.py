"""The verb that shows what moved between two versions, or two folders: diff."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from deltawire.buckets import open_bucket
from deltawire.cli.options import AsJson, BucketOption, BucketWord, Trusted, bucket_and
from deltawire.cli.printing import Sheet, emit, show
from deltawire.errors import Gap, NeedsBase
from deltawire.format.checkpoint import Checkpoint
from deltawire.read.adding import Moved
from deltawire.read.naming import version_named
from deltawire.read.subscriber import Subscriber
from deltawire.runlog.records import Position
from deltawire.weights.bits import count
from deltawire.weights.delta import Delta
from deltawire.weights.movement import Movement, movements
from deltawire.weights.movement import total as total_of


def diff(
    bucket: BucketWord = None,
    first: Annotated[
        str | None, typer.Argument(metavar="A", help="A version (number, tag, newest, best:METRIC), or a folder.")
    ] = None,
    second: Annotated[str | None, typer.Argument(metavar="B", help="Another version, or another folder.")] = None,
    at: BucketOption = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="A row for each tensor instead of each layer.")] = False,
    trust: Trusted = None,
    json: AsJson = False,
) -> None:
    """Show what changes from A to B, layer by layer.

    It counts the weights that change, and those of them that move by one increment of their bits.

    With a bucket A and B are versions of its run; only deltas and folds are fetched. Without one, or where both hold a
    "/", they are checkpoint folders.
    """
    pair = [word for word in (bucket, first, second) if word is not None]
    folders = len(pair) == 2 and (at is None or all("/" in word for word in pair))
    if folders:
        delta, sizes = _between_folders(Path(pair[0]), Path(pair[1]))
    else:
        url, here, there = bucket_and(at, bucket, first, second, names="BUCKET A B")
        delta, sizes = between_versions(url, here, there, trust or [])
    parts = movements(delta, sizes, by_tensor=tensors)
    summary = total_of(parts)
    if json:
        for part in [*parts, summary]:
            emit(msgspec.to_builtins(part), "", json)
        return
    table = Sheet("tensor" if tensors else "layer", "moved", "elements", "changed", "share", "of them ±1")
    for part in parts:
        table.add_row(*_moved(part))
    table.add_section()
    table.add_row(*_moved(summary))
    show(table)


def _moved(part: Movement) -> tuple[str, ...]:
    moved = f"{part.moved} of {part.tensors}"
    ones = f"{part.ones_share:.1%}" if part.changed else ""
    return part.name, moved, f"{part.elements:,}", f"{part.changed:,}", f"{part.density:.3%}", ones


def between_versions(bucket: str, first: str, second: str, trust: list[str]) -> tuple[Delta, dict[str, int]]:
    """What changed from a named version of a bucket's run to another, and the elements of each tensor."""
    with Subscriber(open_bucket(bucket), trusted=trust) as subscriber:
        here = subscriber.position_at(version_named(subscriber, first))
        there = version_named(subscriber, second)
        sizes = {entry.name: count(entry.shape) for entry in subscriber.run.table}
        return _between(subscriber, here, there), sizes


def _between(subscriber: Subscriber, first: Position, second: int) -> Delta:
    """What changed between two versions, either of which may be the older one."""
    with suppress(NeedsBase, Gap):
        return subscriber.change(first, second, anchors=False).delta
    older, newer = sorted((first.version, second))  # read with the weights of the older one: an anchor's, moved there
    start = subscriber.change(None, older)
    assert start.anchor is not None
    weights = Moved(start.anchor, start.delta)
    change = subscriber.change(start.position, newer, weights=weights, anchors=False).delta
    return change if first.version == older else -change


def _between_folders(first: Path, second: Path) -> tuple[Delta, dict[str, int]]:
    for folder in (first, second):
        if not folder.is_dir():
            raise typer.BadParameter(f"{folder} is no folder; name versions together with --bucket")
    old = Checkpoint(first)
    return Delta.between(old, Checkpoint(second)), {name: old[name].data.size for name in old}
