"""The checkpoint a run starts from by reference: a Hub repository at a revision, or a folder."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deltawire.buckets.hub_refusals import local_refusal
from deltawire.buckets.proxies import proxy_note
from deltawire.buckets.refusals import is_later
from deltawire.errors import AccessRefused, BucketError, FormatError, NotFound, Unavailable
from deltawire.runlog.records import BaseCheckpoint, Run

PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model"]
"""what a checkpoint needs of a repository: no pickles, no other frameworks' weights"""
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[\w.-]{1,96})?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def resolve_base(source: str) -> BaseCheckpoint:
    """Pin what the user named: a folder by its absolute path, a Hub repository by its newest commit.

    Raises NotFound for neither, AccessRefused, Unavailable, ImportError without huggingface_hub.
    """
    if Path(source).is_dir():
        return BaseCheckpoint(str(Path(source).resolve()))
    with _hub_errors(f"base {source!r}, which is no folder here"):
        import huggingface_hub

        return BaseCheckpoint(source, huggingface_hub.HfApi().model_info(source).sha)


def open_base(base: BaseCheckpoint) -> Path:
    """The base as a folder on this host, downloaded from the Hub if need be (its cache is used). The caller named it:
    what a bucket names is opened by `base_of`.

    Raises NotFound naming the next step, AccessRefused, Unavailable, OutOfSpace, ImportError without huggingface_hub.
    """
    if base.revision is None:
        if not Path(base.source).is_dir():
            raise NotFound(f"base checkpoint {base.source} is not on this host; pass base=, a folder that holds it")
        return Path(base.source)
    with _hub_errors(f"base checkpoint {base.source}@{base.revision}"):
        import huggingface_hub

        return Path(huggingface_hub.snapshot_download(base.source, revision=base.revision, allow_patterns=PATTERNS))


def base_of(run: Run) -> Path:
    """The checkpoint on the Hub that a run's version 0 refers to. A folder that only a bucket names is never opened:
    a writer of the bucket would choose what is read on this host.

    Raises FormatError when the run refers to none, or to what cannot be a repository at a commit; NotFound for a
    folder, which the reader has to name itself; what `open_base` raises.
    """
    base = run.base
    if base is None:
        raise FormatError(f"run {run.run}: version 0 has no payload and names no base checkpoint")
    if base.revision is None:
        raise NotFound(
            f"run {run.run} starts from a folder of its trainer's host, {base.source}: pass base=, a folder that holds "
            "it on this host (--base FOLDER on the command line). A folder that only the bucket names is not opened"
        )
    if not (_REPOSITORY.fullmatch(base.source) and _COMMIT.fullmatch(base.revision)):
        raise FormatError(f"run {run.run}: base {base.source!r}@{base.revision!r} is no Hub repository at a commit")
    return open_base(base)


def require_public(base: BaseCheckpoint) -> None:
    """Raise AccessRefused unless everybody may read a base on the Hub: what is written to a bucket is read by those who
    read the bucket, and this host's token may read more than they. Asked without a token. Raises Unavailable."""
    what = f"base checkpoint {base.source}@{base.revision}"
    remedy = f"--base $(hf download {base.source} --revision {base.revision}), or base= in Python"
    with _hub_errors(what):
        import huggingface_hub

        api = huggingface_hub.HfApi(token=False)
        try:
            found = api.model_info(base.source, revision=base.revision)
        except huggingface_hub.errors.HfHubHTTPError as error:
            if error.response.status_code >= 500 or error.response.status_code == 429:
                raise
            found = None
    if found is None or found.private or found.gated:
        raise AccessRefused(
            f"{what} is not public, and only the bucket names it: its files are not copied into the bucket unless you "
            f"name it yourself: {remedy}"
        )


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    """What the Hub's client raises, as the BucketError that says the same of `what`."""
    try:
        from httpx2 import HTTPError
        from huggingface_hub import constants, errors
    except ImportError:
        raise ImportError("a base on the Hub needs huggingface_hub: pip install 'deltawire[hub]'") from None
    try:
        yield
    except errors.GatedRepoError as error:
        raise AccessRefused(f"{what}: accept its terms on its Hub page, then run `hf auth login`: {error}") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise NotFound(
            f"{what}: no such model on the Hub, or not for this token; check the name, or run `hf auth login`: {error}"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        final = AccessRefused if status in (401, 403) else BucketError
        raise (Unavailable if is_later(status) else final)(
            f"{what}: the Hub answered HTTP {status}: {error}"
        ) from error
    except (HTTPError, OSError, RuntimeError) as error:
        if local := local_refusal(what, error):
            raise local from error
        raise Unavailable(
            f"{what}: no answer from the Hub{proxy_note(constants.ENDPOINT)}; pass base=, a folder that holds the "
            f"checkpoint: {error}"
        ) from error
