"""The arguments and options that several verbs share."""

from pathlib import Path
from typing import Annotated

import typer

BucketUrl = Annotated[str, typer.Argument(metavar="BUCKET", help="hf://buckets/ns/name, s3://…, file:///folder, …")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object a line instead of text.")]
Trusted = Annotated[
    list[str] | None,
    typer.Option("--trust", metavar="KEY", help="Accept only what this public key, or a key in this file, signed."),
]
BaseFolder = Annotated[
    Path | None, typer.Option(help="Folder here of the base checkpoint, for a run that starts from a folder.")
]
EngineUrl = Annotated[str, typer.Option(help="The vLLM server on this host.")]
