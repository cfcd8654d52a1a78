"""The verb that shows how a run and its fleet are doing: once, again and again, or as a page."""

import sys
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deltawire.buckets import Bucket, open_bucket
from deltawire.cli.options import AsJson, BucketOption, BucketWord, Trusted, bucket_and, host_and_port, listening_at
from deltawire.cli.printing import arrange, duration, emit, plain, plain_console, size
from deltawire.errors import BucketError, ChainError, FormatError, error_text
from deltawire.fleet.page import Board
from deltawire.fleet.status import FleetStatus, ReplicaStatus, TrainerStatus, Watcher
from deltawire.follow.port import Port, Route

LOOK_EVERY = 2.0
"""seconds between two looks of --watch, or what suits the store if that is longer"""
COLOURS = {"current": "green", "behind": "yellow", "unready": "red", "silent": "red"}


def status(
    bucket: BucketWord = None,
    watch: Annotated[bool, typer.Option("--watch", help="Look again and again, until Ctrl-C.")] = False,
    serve: Annotated[
        str | None, typer.Option(metavar="[HOST:]PORT", help="Show it as a page here, until Ctrl-C; 0 picks a port.")
    ] = None,
    trust: Trusted = None,
    at: BucketOption = None,
    json: AsJson = False,
) -> None:
    """Show how a run and its replicas are doing.

    That is the trainer's last version, and what each replica serves and how far it is behind. It reads the bucket
    alone: commits, and the heartbeats that followers and the trainer write.
    """
    store = open_bucket(*bucket_and(at, bucket))
    if serve is not None:
        _serve(store, serve, trust or [], json)
        return
    with Watcher(store, trusted=trust or ()) as watcher:
        if not watch:
            _show(watcher.look(), json)
        elif json or not sys.stdout.isatty():
            _watch_lines(watcher, max(LOOK_EVERY, store.poll_seconds), json)
        else:
            _watch_screen(watcher, max(LOOK_EVERY, store.poll_seconds))


def doctor(
    bucket: BucketWord = None,
    engine: Annotated[
        str | None,
        typer.Option(help="The vLLM server; default: look at the bucket alone.", envvar="DELTAWIRE_ENGINE"),
    ] = None,
    run: Annotated[
        str | None, typer.Option(metavar="ID", help="The run that is meant.", envvar="DELTAWIRE_RUN")
    ] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="This host only follows: write nothing.")] = False,
    trust: Trusted = None,
    at: BucketOption = None,
    json: AsJson = False,
) -> None:
    """Find what keeps a bucket and a vLLM server apart.

    Each fault comes with its fix. It writes one small object to the bucket and removes it. vLLM's worker is asked to
    read the bucket by itself. The exit code is 1 if there is a fault.
    """
    from deltawire.fleet.doctor import examine

    faults, store = 0, open_bucket(*bucket_and(at, bucket))
    for found in examine(store, engine, run=run, trusted=trust or (), read_only=read_only):
        faults += found.level == "fault"
        fix = "" if found.fix is None else f"\n       fix: {plain(found.fix, 1000)}"
        emit(found, f"{found.level:5}  {found.check}: {plain(found.said, 1000)}{fix}", json)
    raise typer.Exit(1 if faults else 0)


def _show(seen: FleetStatus, as_json: bool) -> None:
    if as_json:
        emit(seen, "", as_json)
    else:
        plain_console().print(as_text(seen), crop=False)


def _watch_lines(watcher: Watcher, pause: float, as_json: bool) -> None:
    """Print what changed, whenever something did."""
    last: object = None
    while True:
        try:
            seen = watcher.look()
        except (BucketError, FormatError, ChainError) as error:
            if str(error) != last:
                emit({"problem": error_text(error)}, plain(f"problem: {error_text(error)}", None), as_json)
            last = str(error)
        else:
            facts = seen.trainer.version, [(one.replica, one.version, one.state) for one in seen.replicas]
            if facts != last:
                _show(seen, as_json)
            last = facts
        time.sleep(pause)


def _watch_screen(watcher: Watcher, pause: float) -> None:
    with Live(console=Console(), auto_refresh=False) as screen:
        while True:
            try:
                screen.update(as_text(watcher.look()), refresh=True)
            except (BucketError, FormatError, ChainError) as error:
                screen.update(Text(plain(f"problem: {error_text(error)}", None)), refresh=True)
            time.sleep(pause)


def as_text(seen: FleetStatus) -> Group:
    """The trainer in a few lines, and a table of the replicas."""
    table = Table("replica", "", "version", "behind", "heard", "pause p50/p99", "bytes", "audit", "why not ready")
    for one in seen.replicas:
        table.add_row(*_row(one))
    arrange(table)
    fleet = table if seen.replicas else Text("no replica has written a heartbeat yet: start `deltawire follow`")
    return Group(Text("\n".join(_trainer(seen.bucket, seen.trainer))), fleet)


def _trainer(bucket: str, trainer: TrainerStatus) -> list[str]:
    step = "" if trainer.step is None else f" (step {trainer.step:,})"
    lines = [
        f"run {trainer.run} in {bucket}{'' if trainer.signed else ', unsigned'}",
        f"trainer: version {trainer.version}{step}, committed {duration(trainer.age_s)} ago",
    ]
    if trainer.versions_per_hour is not None:
        lines[-1] += f", {_rate(trainer.versions_per_hour)} versions an hour"
    if trainer.bytes_per_version is not None:
        lines[-1] += f", {size(round(trainer.bytes_per_version))} each"
    if trainer.ended:
        lines.append("the trainer closed the run")
    if trainer.waiting:
        lines.append(f"waiting for the store: {trainer.waiting} versions, {size(trainer.waiting_bytes or 0)}")
    if trainer.problem is not None:
        lines.append(f"problem: {plain(trainer.problem)}")
    return lines


def _rate(number: float) -> str:
    """Three digits at least, and no more behind the point than that takes."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}"


def _row(one: ReplicaStatus) -> tuple[Text | str, ...]:
    behind = "" if one.lag is None else "0" if not one.lag else f"{one.lag} ({duration(one.lag_s or 0)})"
    p50, p99 = one.pause_p50_ms, one.pause_p99_ms
    return (
        Text(plain(one.replica, 100)),
        Text(one.state, style=COLOURS[one.state]),
        "" if one.version is None else str(one.version),
        behind,
        f"{duration(one.heard_s)} ago",
        "" if p50 is None or p99 is None else f"{p50:.1f}/{p99:.1f} ms",
        "" if one.fetched_bytes is None else size(one.fetched_bytes),
        Text(plain(one.audit or "", 100)),
        Text(plain(one.why or "")),
    )


def _serve(bucket: Bucket, address: str, trusted: list[str], as_json: bool) -> None:
    with closing(Board(Watcher(bucket, trusted=trusted))) as board, open_port([board], address, "--serve") as port:
        emit({"event": "page", "url": port.url}, f"page at {port.url}", as_json)
        threading.Event().wait()


def open_port(routes: Sequence[Route], address: str, option: str) -> Port:
    """Routes on [HOST:]PORT, by default of loopback. Raises BadParameter, naming the option, where that cannot be."""
    host, number = host_and_port(address, option)
    with listening_at(host, number, option):
        return Port(routes, number, host=host)
