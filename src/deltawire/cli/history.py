"""Verbs that show a run's history: log, diff."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from deltawire.buckets import open_bucket
from deltawire.cli.options import AsJson, BucketOption, BucketWord, Trusted, bucket_and
from deltawire.cli.printing import Sheet, duration, emit, plain, show, size
from deltawire.errors import Gap, NeedsBase, some
from deltawire.format.checkpoint import Checkpoint
from deltawire.read.adding import Moved
from deltawire.read.naming import version_named
from deltawire.read.subscriber import Subscriber
from deltawire.runlog.records import Commit, Position
from deltawire.runlog.tags import read_tags
from deltawire.weights.bits import count
from deltawire.weights.delta import Delta
from deltawire.weights.movement import Movement, movements
from deltawire.weights.movement import total as total_of

LISTED = 20
"""versions that `deltawire log` lists unless another number is given"""
BARS = "▁▂▃▄▅▆▇█"
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


@dataclass(frozen=True, slots=True)
class Listing:
    """What `log` shows: commits, the oldest first; their tags by version; bytes of a checkpoint; and the time now."""

    commits: Sequence[Commit]
    tags: Mapping[int, list[str]]
    whole: int
    now: float

    def share(self, commit: Commit) -> float | None:
        """Bytes of a version beside those of a checkpoint; None for an anchor, which is one."""
        return None if commit.parent is None or not self.whole else commit.wire_bytes / self.whole

    def metrics(self) -> list[str]:
        """The names of all metrics."""
        return sorted({name for commit in self.commits for name in commit.metrics})


def log(
    bucket: BucketWord = None,
    number: Annotated[
        int | None,
        typer.Option("--number", "-n", min=0, help="How many, 0: all; default: 20, with --json or --since all."),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(metavar="AGE|DATE", help="Only versions this young: 90s, 30m, 2h, 3d, 2026-11-30T12:00."),
    ] = None,
    oneline: Annotated[bool, typer.Option("--oneline", help="A line a version, without a table.")] = False,
    metric: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Show this metric, may be repeated; default: all.")
    ] = None,
    digests: Annotated[
        bool, typer.Option("--digests", help="With --json: the digest of each changed tensor, too.")
    ] = False,
    trust: Trusted = None,
    at: BucketOption = None,
    json: AsJson = False,
) -> None:
    """List the newest versions of a run, the newest last.

    A row has bytes, step, age, metrics, tags and writer. It reads the commits that it lists, and checks that they are a
    chain. With -n 0 it checks their roots, too. The row of bars below the table is each delta's size beside that of a
    checkpoint.
    """
    most = number if number is not None else 0 if json or since else LISTED
    after = None if since is None else _moment(since, time.time())
    with Subscriber(open_bucket(*bucket_and(at, bucket)), trusted=trust or ()) as subscriber:
        commits = subscriber.commits() if not most and after is None else subscriber.recent(most or None, since=after)
        older = _older(subscriber, commits) if not json else 0
        whole = sum(entry.nbytes for entry in subscriber.run.table)
        listing = Listing(commits, _tags(subscriber), whole, time.time())
    if json:
        for record in _records(listing, digests=digests):
            emit(record, "", json)
        return
    _require_metrics(metric, listing)
    if oneline:
        for line in _lines(listing, metric):
            print(plain(line, None))
    elif commits:
        _show_table(listing, metric)
    _tell_of_older(older, listed=bool(commits), by_age=since is not None)


def _tell_of_older(older: int, *, listed: bool, by_age: bool) -> None:
    """Say how many versions were not listed, and why."""
    if by_age and not listed:
        print(f"no version is this young; {older:,} are older")
    elif older:
        print(f"{older:,} older" + ("" if by_age else ": -n NUMBER lists more, -n 0 all"))


def _tags(subscriber: Subscriber) -> dict[int, list[str]]:
    """The names of each tagged version."""
    names: dict[int, list[str]] = {}
    for tag in read_tags(subscriber.bucket, subscriber.run.run, trust=subscriber.trust):
        names.setdefault(tag.version, []).append(tag.name)
    return names


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
        delta, sizes = _between_versions(url, here, there, trust or [])
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


def sparkline(shares: Sequence[float]) -> str:
    """A bar for each number, the highest for the largest; nothing for fewer than two."""
    if len(shares) < 2 or not (most := max(shares)):
        return ""
    return "".join(BARS[round((len(BARS) - 1) * share / most)] for share in shares)


def _older(subscriber: Subscriber, commits: Sequence[Commit]) -> int:
    """Committed versions before those listed, from a listing."""
    oldest = commits[0].version if commits else subscriber.latest().version + 1
    return sum(version < oldest for version in subscriber.chain.versions())


def _require_metrics(chosen: Sequence[str] | None, listing: Listing) -> None:
    """Raises BadParameter where no version listed has a metric that was asked for."""
    there = listing.metrics()
    if unknown := [name for name in chosen or () if name not in there]:
        known = ", ".join(there) or "none"
        raise typer.BadParameter(f"no version listed has {some(unknown)}; metrics: {known}", param_hint="--metric")


def _moment(text: str, now: float) -> float:
    """Seconds since the epoch of an age or a date."""
    number, unit = text[:-1], text[-1:]
    if unit in UNITS and number.replace(".", "", 1).isdecimal():
        return now - float(number) * UNITS[unit]
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is neither an age as 90s, 30m, 2h, 3d nor a date", param_hint="--since"
        ) from None


def _records(listing: Listing, *, digests: bool) -> Iterator[dict[str, object]]:
    for commit in listing.commits:
        record = msgspec.to_builtins(commit)
        record["changed_tensors"] = len(commit.digests)
        record["wire_bytes"] = commit.wire_bytes
        record["tags"] = listing.tags.get(commit.version, [])
        if not digests:
            del record["digests"]
        yield record


def _lines(listing: Listing, chosen: Sequence[str] | None) -> Iterator[str]:
    for commit in listing.commits:
        parts = [f"{commit.version:06d}", commit.root[:12], _age(listing, commit), size(commit.wire_bytes)]
        parts += [] if commit.step is None else [f"step {commit.step}"]
        parts += [
            f"{name} {_number(commit.metrics[name])}"
            for name in chosen or sorted(commit.metrics)
            if name in commit.metrics
        ]
        if names := listing.tags.get(commit.version):
            parts.append(f"({', '.join(names)})")
        yield "  ".join(parts)


def _show_table(listing: Listing, chosen: Sequence[str] | None) -> None:
    """Print the table, and below it a row of bars."""
    show(_table(listing, chosen))
    if bars := sparkline([share for commit in listing.commits if (share := listing.share(commit)) is not None]):
        print(bars)


def _table(listing: Listing, chosen: Sequence[str] | None) -> Sheet:
    """The table, without columns that no version has anything for."""
    metrics = [*chosen] if chosen else listing.metrics()
    heads = (
        "version",
        "from",
        "step",
        "age",
        "bytes",
        "share",
        "tensors",
        *metrics,
        "tags",
        "writer",
        "signer",
        "root",
    )
    rows = [_row(listing, commit, metrics) for commit in listing.commits]
    kept = [column for column in range(len(heads)) if any(row[column] for row in rows)]
    table = Sheet(*(heads[column] for column in kept), title=f"run {listing.commits[0].run}")
    for row in rows:
        table.add_row(*(row[column] for column in kept))
    return table


def _row(listing: Listing, commit: Commit, metrics: Sequence[str]) -> tuple[str, ...]:
    share = listing.share(commit)
    return (
        str(commit.version),
        "anchor" if commit.parent is None else str(commit.parent),
        "" if commit.step is None else str(commit.step),
        _age(listing, commit),
        size(commit.wire_bytes),
        "" if share is None else f"{share:.2%}",
        str(len(commit.digests)),
        *(_number(commit.metrics.get(name)) for name in metrics),
        " ".join(listing.tags.get(commit.version, ())),
        commit.writer or "",
        (commit.signer or "")[:8],
        commit.root[:12],
    )


def _age(listing: Listing, commit: Commit) -> str:
    return duration(max(listing.now - commit.created, 0.0))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _moved(part: Movement) -> tuple[str, ...]:
    moved = f"{part.moved} of {part.tensors}"
    ones = f"{part.ones_share:.1%}" if part.changed else ""
    return part.name, moved, f"{part.elements:,}", f"{part.changed:,}", f"{part.density:.3%}", ones


def _between_versions(bucket: str, first: str, second: str, trust: list[str]) -> tuple[Delta, dict[str, int]]:
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
