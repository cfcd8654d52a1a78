"""The checkpoint a run starts from by reference: a Hub repository at a revision, or a folder."""

from pathlib import Path
from typing import Any

from deltawire.errors import FormatError, NotFound
from deltawire.manifests import BaseCheckpoint, Run

PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model"]
"""what a checkpoint needs of a repository: no pickles, no other frameworks' weights"""


def resolve_base(source: str) -> BaseCheckpoint:
    """Pin what the user named: a folder by its absolute path, a Hub repository by its newest commit.

    Raises NotFound for neither, ImportError without huggingface_hub.
    """
    if Path(source).is_dir():
        return BaseCheckpoint(str(Path(source).resolve()))
    hub, refusals = _hub()
    try:
        return BaseCheckpoint(source, hub.HfApi().model_info(source).sha)
    except refusals as error:
        raise NotFound(f"base {source!r} is neither a folder here nor a model on the Hub: {error}") from None


def open_base(base: BaseCheckpoint) -> Path:
    """The base as a folder on this host, downloaded from the Hub if need be (its cache is used).

    Raises NotFound naming the next step, ImportError without huggingface_hub.
    """
    if base.revision is None:
        if not Path(base.source).is_dir():
            raise NotFound(f"base checkpoint {base.source} is not on this host; pass base=, a folder that holds it")
        return Path(base.source)
    hub, refusals = _hub()
    try:
        return Path(hub.snapshot_download(base.source, revision=base.revision, allow_patterns=PATTERNS))
    except refusals as error:
        raise NotFound(
            f"base checkpoint {base.source}@{base.revision} cannot be fetched from the Hub: {error}"
        ) from None


def base_of(run: Run) -> Path:
    """The folder of the checkpoint a run's version 0 refers to. Raises FormatError when it refers to none."""
    if run.base is None:
        raise FormatError(f"run {run.run}: version 0 has no payload and names no base checkpoint")
    return open_base(run.base)


def _hub() -> tuple[Any, tuple[type[Exception], ...]]:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise ImportError("a base on the Hub needs huggingface_hub: pip install 'deltawire[hub]'") from None
    return huggingface_hub, (errors.HfHubHTTPError, errors.HFValidationError, errors.LocalEntryNotFoundError, OSError)
