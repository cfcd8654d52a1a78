"""The arguments and options that several verbs share. Those that a unit or a container sets may come from its
environment; `--help` names the variable."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

ADDRESSES = "hf://buckets/ns/name, s3://…, file:///folder, …"
BUCKET = "DELTAWIRE_BUCKET"
"""the variable that names the bucket where a command line does not"""
BucketWord = Annotated[str | None, typer.Argument(metavar="BUCKET", help=ADDRESSES)]
BucketOption = Annotated[
    str | None,
    typer.Option("--bucket", metavar="BUCKET", help="The bucket, where it is no argument.", envvar=BUCKET),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object a line instead of text.", envvar="DELTAWIRE_JSON")
]
Trusted = Annotated[
    list[str] | None,
    typer.Option(
        "--trust",
        metavar="KEY",
        help="Accept only what this public key, or a key in this file, signed.",
        envvar="DELTAWIRE_TRUST",
    ),
]
BaseFolder = Annotated[
    Path | None,
    typer.Option(
        help="Folder here of the base checkpoint, for a run that starts from a folder.", envvar="DELTAWIRE_BASE"
    ),
]
EngineUrl = Annotated[str, typer.Option(help="The vLLM server on this host.", envvar="DELTAWIRE_ENGINE")]
SigningKeyFile = Annotated[
    Path | None, typer.Option("--key", help="Private key that signs what is written.", envvar="DELTAWIRE_KEY")
]
VersionName = Annotated[
    str,
    typer.Option("--version", metavar="VERSION", help="A number, a tag, newest, or best:METRIC (best:-loss: lowest)."),
]


def bucket_and(option: str | None, *words: str | None, names: str = "BUCKET") -> tuple[str, ...]:
    """The bucket, then the other words of a verb, whose `words` are all that it takes, the bucket's first.

    One rule for every verb: the bucket is the first argument, else what --bucket says, else DELTAWIRE_BUCKET. Raises
    BadParameter where it is named twice or not at all, or another word is missing.
    """
    given = [word for word in words if word is not None]
    if len(given) == len(words):
        if option not in (None, given[0], os.environ.get(BUCKET)):
            raise typer.BadParameter(f"the bucket is named twice: {given[0]} and {option}", param_hint="--bucket")
        return tuple(given)
    if option is None or len(given) < len(words) - 1 or any("://" in word for word in given):
        raise typer.BadParameter(f"give {names}; --bucket or {BUCKET} may name the bucket instead", param_hint=names)
    return option, *given


def host_and_port(address: str, option: str) -> tuple[str, int]:
    """[HOST:]PORT taken apart; without a host it is loopback. Raises BadParameter, naming the option."""
    host, _, port = address.rpartition(":")
    if not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise typer.BadParameter(f"{address!r} is not PORT or HOST:PORT, as 8001 or 0.0.0.0:8001", param_hint=option)
    return host.strip("[]") or "127.0.0.1", int(port)


@contextmanager
def listening_at(host: str, port: int, option: str) -> Iterator[None]:
    """Say which option named a port that cannot be had."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise typer.BadParameter(
            f"cannot listen at {host} port {port}: {why}; name another port (0 picks a free one)", param_hint=option
        ) from None
