"""The verb that names versions."""

import time
from collections.abc import Sequence
from typing import Annotated

import msgspec
import typer

from deltawire.buckets import open_bucket
from deltawire.cli.options import AsJson, BucketOption, BucketWord, SigningKeyFile, Trusted, bucket_and
from deltawire.cli.printing import Sheet, duration, emit, show
from deltawire.read.naming import name_version
from deltawire.read.subscriber import Subscriber
from deltawire.runlog.signing import read_key
from deltawire.runlog.tags import Tag, delete_tag, read_tags


def tag(
    bucket: BucketWord = None,
    version: Annotated[
        str | None, typer.Argument(metavar="VERSION", help="A version: number, tag, newest, best:METRIC.")
    ] = None,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="What to call it.")] = None,
    at: BucketOption = None,
    move: Annotated[bool, typer.Option("--move", help="Let a tag that is there name this version.")] = False,
    delete: Annotated[str | None, typer.Option(metavar="NAME", help="Remove this tag; its version stays.")] = None,
    key: SigningKeyFile = None,
    trust: Trusted = None,
    json: AsJson = False,
) -> None:
    """Name a version, so that `prune` keeps it and --pin finds it. Without VERSION and NAME: list the tags.

    What leads to a tagged version stays, too. In a signed run a follower with --trust asks for a signed tag: --key.
    """
    words = [bucket, version, name]
    listing = version is None  # one word, or none, is the bucket's
    if delete is not None and not listing:
        raise typer.BadParameter("give VERSION and NAME, or --delete NAME, or neither to list the tags")
    url, *named = bucket_and(at, *(words[:1] if listing else words), names="BUCKET VERSION NAME")
    with Subscriber(open_bucket(url), trusted=trust or ()) as subscriber:
        store, run = subscriber.bucket, subscriber.run.run
        if delete is not None:
            delete_tag(store, run, delete)
            emit({"deleted": delete}, f"removed tag {delete}; its version stays", json)
        elif named:
            signing_key = None if key is None else read_key(key)
            report = name_version(subscriber, *named, move=move, key=signing_key)
            moved = f"; it named version {report.before} before"
            text = f"tag {report.tag.name}: version {report.tag.version}"
            emit(
                msgspec.to_builtins(report.tag),
                text if report.before in (None, report.tag.version) else text + moved,
                json,
            )
        else:
            _show_tags(read_tags(store, run, trust=subscriber.trust), json)


def _show_tags(tags: Sequence[Tag], as_json: bool) -> None:
    if as_json:
        for each in tags:
            emit(msgspec.to_builtins(each), "", as_json)
        return
    if not tags:
        print("no tags")
        return
    table = Sheet("tag", "version", "age", "signer")
    for each in tags:
        table.add_row(
            each.name, str(each.version), duration(max(time.time() - each.created, 0.0)), (each.signer or "")[:8]
        )
    show(table)
