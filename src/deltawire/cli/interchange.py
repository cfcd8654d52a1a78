"""Verbs for files beside a bucket: apply deltas to a checkpoint folder, and runs in the layout of TRL's post."""

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from deltawire.buckets import open_bucket
from deltawire.cli.options import (
    ADDRESSES,
    AsJson,
    BaseFolder,
    BucketOption,
    BucketWord,
    SigningKeyFile,
    Trusted,
    VersionName,
    bucket_and,
)
from deltawire.cli.printing import counted, emit, progress, size
from deltawire.publish.publisher import Publisher
from deltawire.read.naming import version_named
from deltawire.read.subscriber import Subscriber
from deltawire.upkeep.applying import apply_files
from deltawire.upkeep.trl_layout import export_trl, import_trl


def apply(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A checkpoint folder; it is left as it is.")],
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE", help="Delta files, in order; also those in the layout of TRL's post."),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write; it must not be there yet.")],
    undo: Annotated[bool, typer.Option("--undo", help="Take the deltas back, in the order given.")] = False,
    json: AsJson = False,
) -> None:
    """Apply delta files to a copy of a checkpoint folder.

    It needs no bucket. Each file must continue the one before it. Nothing says what the result should be: `materialize`
    checks digests.
    """
    report = apply_files(folder, files, out, undo=undo)
    text = f"{counted(report.files, 'file')} applied: {counted(report.changed, 'change')}, in {report.folder}"
    emit(msgspec.to_builtins(report, enc_hook=str), text, json)


def import_run(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help=f"Folder or bucket in TRL's layout: {ADDRESSES}")],
    bucket: BucketWord = None,
    assets: Annotated[Path | None, typer.Option(help="Folder with the model's config and tokenizer files.")] = None,
    base: BaseFolder = None,
    key: SigningKeyFile = None,
    at: BucketOption = None,
    json: AsJson = False,
) -> None:
    """Publish a folder in the layout of TRL's post as a run.

    The layout is anchors/ and deltas/, and each bit is kept. Each file becomes a version, from the oldest anchor on. A
    delta must continue the file before it.
    """
    (url,) = bucket_and(at, bucket, names="SOURCE BUCKET")
    target = open_bucket(url, create=True)
    with progress() as bar, Publisher(target, assets=assets, base=base, signing_key=key) as publisher:
        task = bar.add_task("files", total=None)
        report = import_trl(open_bucket(source), publisher, on_step=lambda step: bar.advance(task))
    text = (
        f"{counted(report.files, 'file')}, {size(report.read_bytes)}, are {report.position} in {target.url}: "
        f"{size(report.wire_bytes)}"
    )
    emit(msgspec.to_builtins(report), text, json)


def export(
    bucket: BucketWord = None,
    out_dir: Annotated[
        str | None, typer.Argument(metavar="OUT", help="Folder to write; empty, or not there yet.")
    ] = None,
    version: VersionName = "newest",
    anchor_every: Annotated[int, typer.Option(min=1, help="Versions between anchors.")] = 10,
    base: BaseFolder = None,
    trust: Trusted = None,
    at: BucketOption = None,
    json: AsJson = False,
) -> None:
    """Write a run in the layout of TRL's post.

    The layout is anchors/ and deltas/ of indices and values. --version is the last version written.
    """
    url, out = bucket_and(at, bucket, out_dir, names="BUCKET OUT")
    with progress() as bar, Subscriber(open_bucket(url), base=base, trusted=trust or ()) as subscriber:
        task = bar.add_task("versions", total=None)
        until = version_named(subscriber, version)
        report = export_trl(
            subscriber, Path(out), until=until, anchor_every=anchor_every, on_version=lambda number: bar.advance(task)
        )
    text = (
        f"versions {report.first} to {report.last} in {report.folder}: {counted(report.anchors, 'anchor')}, "
        f"{counted(report.deltas, 'delta')}, {size(report.written_bytes)}"
    )
    emit(msgspec.to_builtins(report, enc_hook=str), text, json)
