"""S3, GCS and Azure as buckets, opened as the environment says: credentials, region, endpoint, proxy."""

import os
from datetime import timedelta
from typing import Any

from obstore import exceptions, store

from deltawire.buckets.addresses import is_loopback, parts_of, without_password
from deltawire.buckets.objects import ObjectBucket
from deltawire.buckets.proxies import proxy_note, spare_loopback
from deltawire.buckets.refusals import first_line
from deltawire.errors import BadUrl

CLOUDS: dict[str, Any] = {"s3": store.S3Store, "gs": store.GCSStore, "az": store.AzureStore}
_HOMES = {"gs": "https://storage.googleapis.com", "az": "https://blob.core.windows.net"}
# obstore's own retries would hold a caller for three minutes; deltawire.buckets.Retry decides how long to insist.
_QUICK_RETRIES: Any = {"max_retries": 2, "retry_timeout": timedelta(seconds=15)}
_PATIENCE = "2min"
"""for one request with its body; obstore's 30 s are too few for four parts on a slow line"""
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


def open_cloud(scheme: str, name: str) -> ObjectBucket:
    """The S3 or GCS bucket or Azure container `name`; account, keys and endpoint come from the environment.

    Keys of S3 that are no variables are looked for as boto3 does, where it is installed: profiles, SSO, roles.

    Raises BadUrl if the environment lacks what this store needs.
    """
    url = f"{scheme}://{name}"
    settings = _s3_settings(url) if scheme == "s3" else {}
    endpoint = _endpoint(settings, scheme)
    spare_loopback(endpoint)
    try:
        # The clouds' own addresses are https; plain http is only what an AWS_ENDPOINT_URL names, as for boto3.
        objects = CLOUDS[scheme](name, retry_config=_QUICK_RETRIES, allow_http=True, timeout=_PATIENCE, **settings)
    except (exceptions.BaseError, ValueError) as error:
        raise BadUrl(f"{url}: {first_line(error)}; set the variables that the store's own tools use") from error
    through = proxy_note(endpoint, also=("AWS_PROXY_URL",) if scheme == "s3" else ())
    return ObjectBucket(url, objects, poll_seconds=0.5 if is_loopback(endpoint) else 2.0, through=through)


def _endpoint(settings: dict[str, Any], scheme: str) -> str:
    """Where requests go, as far as the environment tells. Raises BadUrl unless that is an address."""
    if scheme != "s3":
        return _HOMES[scheme]
    named = next((name for name in _ENDPOINTS if os.environ.get(name)), None)
    endpoint = os.environ[named] if named else settings.get("endpoint", "https://s3.amazonaws.com")
    parts = parts_of(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname or " " in endpoint:
        shown = without_password(endpoint)
        raise BadUrl(f"{named or 'endpoint_url'} is {shown!r}: not an address that starts with http:// or https://")
    return endpoint


def _s3_settings(url: str) -> dict[str, Any]:
    """What obstore does not read itself: the credentials, region and endpoint of a profile, through boto3."""
    unsigned = os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true")
    if os.environ.get("AWS_ACCESS_KEY_ID") or unsigned:
        return {}
    try:
        import botocore.session
        from botocore.exceptions import BotoCoreError
    except ImportError:
        return {}
    session = botocore.session.get_session()
    try:
        profile = session.get_scoped_config()
    except BotoCoreError as error:
        raise BadUrl(f"{url}: {error}; AWS_PROFILE chooses a profile of ~/.aws/config") from error
    settings: dict[str, Any] = {"credential_provider": _Profile(session)}
    if profile.get("region") and not (os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")):
        settings["region"] = profile["region"]
    if profile.get("endpoint_url") and not any(os.environ.get(name) for name in _ENDPOINTS):
        settings["endpoint"] = profile["endpoint_url"]
    return settings


class _Profile:
    """boto3's credentials, looked for at the first request: opening a bucket asks nobody anything."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._found: Any = None

    def __call__(self) -> Any:
        if self._found is None:
            from obstore.auth.boto3 import Boto3CredentialProvider

            self._found = Boto3CredentialProvider(self._session)
        return self._found()
