"""Verbs that show and check what was published: a run, a version as a checkpoint, a delta file, a live placement."""

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from deltawire.buckets import open_bucket
from deltawire.cli.options import AsJson, BaseFolder, BucketOption, BucketWord, Trusted, VersionName, bucket_and
from deltawire.cli.printing import Sheet, counted, emit, progress, show, size
from deltawire.errors import EngineUnsupported, FormatError
from deltawire.format import checkpoint, delta_file
from deltawire.read.changes import Update
from deltawire.read.naming import version_named
from deltawire.read.subscriber import Subscriber
from deltawire.runlog.planner import Edge
from deltawire.upkeep.materialize import materialize as materialize_version
from deltawire.upkeep.verify import verify as verify_run


def inspect(
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="A delta file.")] = None,
    engine: Annotated[str | None, typer.Option(help="A vLLM server: show where each tensor lives in it.")] = None,
    json: AsJson = False,
) -> None:
    """Show what is in a delta file, or a server's placement.

    The file's container and its seal are checked.
    """
    if (file is None) == (engine is None):
        raise typer.BadParameter("name a delta file, or a server with --engine")
    if engine is not None:
        _show_placement(engine, json)
        return
    assert file is not None
    if file.is_dir() or ":/" in str(file):
        raise typer.BadParameter(f"{file} is no delta file; `deltawire log` and `deltawire verify` read a bucket")
    data = file.read_bytes()
    try:
        header = delta_file.read_header(data)
    except FormatError as error:
        raise type(error)(f"{file}: {error}") from None
    if json:
        emit({"file": str(file), "bytes": len(data), **msgspec.to_builtins(header)}, "", json)
        return
    span = f"{header.run}: {header.parent} to {header.version}" if header.run else "imported, no run named"
    seal = "seal right" if header.sealed else "no seal in the file"
    table = Sheet("tensor", "dtype", "shape", "changed", "share", "as", title=f"{span}, codec {header.codec}, {seal}")
    for spec, encoding in zip(header.tensors, header.encodings, strict=True):
        share = f"{spec.changed / spec.total:.3%}" if header.sealed else ""
        table.add_row(spec.name, spec.dtype, str(list(spec.shape)), f"{spec.changed:,}", share, encoding)
    show(table)


def verify(
    bucket: BucketWord = None,
    base: BaseFolder = None,
    trust: Trusted = None,
    at: BucketOption = None,
    json: AsJson = False,
) -> None:
    """Read all of a run, and recompute every digest.

    All of it is every delta, fold and anchor.
    """
    (url,) = bucket_and(at, bucket)
    with progress() as bar:
        task = bar.add_task("deltas, folds, anchors", total=None)

        def advance(edge: Edge, total: int) -> None:
            bar.update(task, advance=1, total=total)

        report = verify_run(open_bucket(url), base=base, trusted=trust or (), on_read=advance)
    text = (
        f"versions {report.first} to {report.position.version} of run {report.position.run} are right: "
        f"{counted(report.deltas, 'delta')}, {counted(report.folds, 'fold')}, "
        f"{report.anchors} {'anchor or base' if report.anchors == 1 else 'anchors or bases'}, "
        f"{size(report.fetched_bytes)} read"
    )
    if report.tagged:
        text += f"\nso is what tags keep below: {', '.join(map(str, report.tagged))}"
    if report.junk:
        text += f"\n{report.junk} objects under keys of folds or anchors are none; no reader follows them"
    emit(msgspec.to_builtins(report), text, json)


def materialize(
    bucket: BucketWord = None,
    out_dir: Annotated[
        str | None, typer.Argument(metavar="OUT", help="Folder to write, or that holds another version of this run.")
    ] = None,
    version: VersionName = "newest",
    base: BaseFolder = None,
    trust: Trusted = None,
    at: BucketOption = None,
    json: AsJson = False,
) -> None:
    """Write a version as a Hugging Face checkpoint folder.

    vLLM and transformers load it.
    """
    url, folder = bucket_and(at, bucket, out_dir, names="BUCKET OUT")
    store, out = open_bucket(url), Path(folder)
    with progress() as bar:
        with Subscriber(store, base=base, trusted=trust or ()) as subscriber:
            wanted = version_named(subscriber, version)
            total = sum(1 for commit in subscriber.commits() if commit.version <= wanted)
        task = bar.add_task("versions", total=total)

        def advance(update: Update) -> None:
            bar.advance(task)

        report = materialize_version(store, out, wanted, base=base, trusted=trust or (), on_update=advance)
    fetched = f"{counted(report.deltas, 'delta')} applied, {size(report.fetched_bytes)} fetched, {report.seconds:.1f} s"
    text = f"{report.position} in {out}: {fetched if report.fetched_bytes else 'it was there already'}"
    if not any((out / config).is_file() for config in ("config.json", checkpoint.ADAPTER_CONFIG)):
        text += "\nit has no config.json: neither the base of this run nor its assets= held one"
    emit(msgspec.to_builtins(report, enc_hook=str), text, json)


def _show_placement(engine: str, as_json: bool) -> None:
    from deltawire.vllm.client import EngineClient

    with EngineClient(engine) as client:
        workers, shown = client.placement(), client.url
    if not any(worker.placement for worker in workers):
        raise EngineUnsupported(
            f"{shown} follows no bucket yet, and where its weights live is found out when it does: start `deltawire "
            f"follow --bucket … --engine {shown}` first"
        )
    if as_json:
        for worker in workers:
            emit(msgspec.to_builtins(worker), "", as_json)
        return
    table = Sheet("tensor", "worker", "parameter", "elements", "from", title=shown)
    for worker in workers:
        rank = str(worker.rank)
        for name, boxes in worker.placement.items():
            for box in boxes:
                table.add_row(name, rank, box.parameter, f"{box.size:,}", f"{box.source_offset:,}")
        for name in worker.frozen:
            table.add_row(name, rank, "not loaded here; the run never changes it", "", "")
        for module in worker.remade:
            table.add_row(f"({module})", rank, "made again at each update", "", "")
    show(table)
