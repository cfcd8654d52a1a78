"""The verb that shows a run's history: log."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated

import msgspec
import typer

from deltawire.buckets import open_bucket
from deltawire.cli.options import AsJson, BucketOption, BucketWord, Trusted, bucket_and
from deltawire.cli.printing import Sheet, duration, emit, plain, show, size
from deltawire.errors import some
from deltawire.read.subscriber import Subscriber
from deltawire.runlog.keys import needs_weights
from deltawire.runlog.records import Commit
from deltawire.runlog.tags import read_tags

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
    checkpoint. Where the trainer chose between codecs, a line says which it chose for the newest version, and why.
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
    """Print the table, and below it a row of bars, and why the newest version is of its codec."""
    show(_table(listing, chosen))
    if bars := sparkline([share for commit in listing.commits if (share := listing.share(commit)) is not None]):
        print(bars)
    if chosen_codecs := [commit for commit in listing.commits if isinstance(commit.choice, str)]:
        newest = chosen_codecs[-1]
        print(plain(f"version {newest.version} is of {newest.choice}"))


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
        "codec",
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
        "class" if any(needs_weights(payload.key) for payload in commit.payloads) else "",
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
