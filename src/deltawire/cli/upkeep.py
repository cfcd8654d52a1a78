"""Verbs that keep a run cheap to read and to store, and the key that signs it."""

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from deltawire.buckets import open_bucket
from deltawire.buckets.temporary import TemporaryFolder
from deltawire.cli.options import (
    ADDRESSES,
    AsJson,
    BaseFolder,
    BucketOption,
    BucketWord,
    SigningKeyFile,
    Trusted,
    bucket_and,
)
from deltawire.cli.printing import counted, emit, size
from deltawire.errors import error_text
from deltawire.read.subscriber import Subscriber
from deltawire.runlog.keys import HEAD_KEY


def compact(
    bucket: BucketWord = None,
    mirror: Annotated[Path | None, typer.Option(help="Folder that keeps the weights for the next time.")] = None,
    anchor_every: Annotated[
        int | None, typer.Option(min=1, help="Versions between anchors; default: when it pays.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Go on for ever, as versions come.")] = False,
    base: BaseFolder = None,
    trust: Trusted = None,
    key: SigningKeyFile = None,
    at: BucketOption = None,
    json: AsJson = False,
) -> None:
    """Write folds and anchors, so that late readers fetch little.

    A fold is one delta over 4, 16, 64 … versions, and an anchor is a whole checkpoint.
    """
    from deltawire.upkeep.compactor import Cadence, Compactor

    store = open_bucket(*bucket_and(at, bucket))
    with TemporaryFolder() as folder:
        place = mirror or folder / "mirror"
        cadence: Cadence = anchor_every or "adaptive"
        with Compactor(store, place, anchors=cadence, base=base, trusted=trust or (), signing_key=key) as compactor:
            tag = None
            while True:
                reports = compactor.step()
                for report in reports:
                    span = "anchor" if report.parent is None else f"fold from {report.parent}"
                    text = f"{span} to {report.version}: {size(report.wire_bytes)}"
                    emit({"event": "compact", **msgspec.to_builtins(report)}, text, json)
                if not watch:
                    if not reports and not json:
                        print("nothing to write: no fold is due, and no anchor would pay yet")
                    return
                found = store.watch(HEAD_KEY, tag=tag, timeout=60.0)
                tag = found.tag if found else tag


def relay(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help=f"The bucket to read: {ADDRESSES}")],
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="The bucket nearby, of its own: file:///folder, s3://…")
    ],
    once: Annotated[bool, typer.Option("--once", help="Copy what is there, then stop.")] = False,
    trust: Trusted = None,
    json: AsJson = False,
) -> None:
    """Keep a copy of a run in a bucket nearby.

    So a host or a region fetches each version once for all of its servers. It begins at the newest anchor, and copies
    byte for byte what comes after: followers of TARGET check the same hashes and signatures. TARGET may be compacted
    and pruned as any bucket. Heartbeats of its followers are passed on to SOURCE, each at most every 30 seconds.
    """
    from deltawire.upkeep.relay import Relay, RelayReport

    def report(step: RelayReport) -> None:
        text = f"version {step.version} is at {target}: {counted(step.objects, 'object')}, {size(step.bytes)}"
        emit({"event": "relay", **msgspec.to_builtins(step)}, text, json)

    def problem(error: Exception) -> None:
        emit({"event": "problem", "error": error_text(error)}, f"problem: {error_text(error)}", json)

    copying = Relay(open_bucket(source), open_bucket(target, create=True), trusted=trust or ())
    if not once:
        copying.run(report, problem)
    elif (step := copying.step()) is not None:
        report(step)
    elif not json:
        print(f"nothing to copy: {target} has the newest version")


def prune(
    bucket: BucketWord = None,
    keep_anchors: Annotated[int, typer.Option(min=1, help="Newest anchors whose chains stay.")] = 2,
    keep_hours: Annotated[float, typer.Option(min=0, help="What was committed within these hours stays.")] = 24.0,
    delete: Annotated[bool, typer.Option("--delete", help="Delete; without it only say what would go.")] = False,
    trust: Trusted = None,
    at: BucketOption = None,
    json: AsJson = False,
) -> None:
    """Remove old versions that no active replica needs.

    It says what would go, and deletes with --delete. A tagged version stays, with what leads to it.
    """
    from deltawire.upkeep import retention
    from deltawire.upkeep.proofs import default_memory

    store = open_bucket(*bucket_and(at, bucket))
    with Subscriber(store, trusted=trust or ()) as subscriber:
        run = subscriber.run.run
    policy = retention.Policy(keep_anchors, keep_hours)
    pruned = retention.find_prunable(store, run, policy, trusted=trust or (), memory=default_memory())
    if delete:
        retention.carry_out(store, pruned)
    done = "deleted" if delete else "would delete (--delete does)"
    what = f"{done} {counted(pruned.objects, 'object')}, {size(pruned.bytes)}, below version {pruned.floor}"
    text = f"{what if pruned.objects else 'nothing to delete'}; kept: {pruned.reason}"
    text += "".join(f", versions {first} to {last} for tags" for first, last in pruned.tagged)
    text += "".join(f"\npassed over as no anchor: {record}" for record in pruned.passed_over)
    emit({"deleted": delete, **msgspec.to_builtins(pruned)}, text, json)


def keygen(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="File to write the private key to; it is never overwritten.")
    ],
    json: AsJson = False,
) -> None:
    """Make a key that signs a run's records.

    It prints the key's public half, for followers to --trust.
    """
    from deltawire.runlog import signing

    public = signing.generate_key(file).public
    emit({"file": str(file), "public": public}, public, json)
