"""How a process reaches a store, as its environment says: compared between follower and worker, and handed over.

A bucket is read by two processes, the follower and vLLM's worker, each with the environment it was started with. Values
of secrets are never shown, compared or handed over: only whether they are set.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from deltawire.buckets.addresses import without_password

_ENDPOINTS = {
    "hf": ("HF_ENDPOINT",),
    "s3": (
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        "AWS_ENDPOINT",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        "AWS_VIRTUAL_HOSTED_STYLE_REQUEST",
        "AWS_SKIP_SIGNATURE",
    ),
    "gs": ("GOOGLE_BASE_URL", "GOOGLE_SKIP_SIGNATURE"),
    "az": ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ENDPOINT", "AZURE_SKIP_SIGNATURE"),
}
"""by scheme, where a store is: what may be handed over"""
_HOST = {"hf": ("HF_HUB_OFFLINE",), "s3": ("AWS_PROFILE",)}
"""by scheme, what else of a process decides what it reaches"""
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy")
_SECRETS = {
    "hf": ("HF_TOKEN",),
    "s3": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    "gs": ("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT"),
    "az": ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_CLIENT_ID", "AZURE_CLIENT_SECRET"),
}
SET = "set"
"""what is shown of a secret that is set"""


def seen(url: str, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What decides whether this process reaches a bucket, by name; of secrets, `SET`. What is unset is left out."""
    scheme = _scheme(url)
    shown = (*_ENDPOINTS.get(scheme, ()), *_HOST.get(scheme, ()), *(_PROXIES if scheme in _ENDPOINTS else ()))
    known = {name: without_password(environ[name], "…@") for name in shown if environ.get(name)}
    return known | {name: SET for name in _SECRETS.get(scheme, ()) if environ.get(name)}


def differences(theirs: Mapping[str, str], mine: Mapping[str, str]) -> list[str]:
    """Sentences that say how another process's environment differs from ours."""
    return [
        f"{name} is {theirs.get(name, 'unset')} there, yours is {mine.get(name, 'unset')}"
        for name in sorted({*theirs, *mine})
        if theirs.get(name) != mine.get(name)
    ]


def endpoints(url: str, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Where a bucket's store is, as this process's environment says, to hand over. Never a secret; an address with a
    password in it is not handed over either."""
    named = _ENDPOINTS.get(_scheme(url), ())
    return {name: environ[name] for name in named if environ.get(name) and "@" not in environ[name]}


@contextmanager
def applied(url: str, settings: Mapping[str, str]) -> Iterator[None]:
    """Have this process's environment say where a bucket's store is, for as long as it takes to open it. Other
    settings are left out."""
    allowed = _ENDPOINTS.get(_scheme(url), ())
    wanted = {name: value for name, value in settings.items() if name in allowed}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _scheme(url: str) -> str:
    return url.partition("://")[0].lower()
