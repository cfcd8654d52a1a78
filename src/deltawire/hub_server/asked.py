"""What a request asks about: a bucket that it may use, a page of a listing, the fields of a JSON body."""

import json
import re
from typing import Any

from starlette.requests import Request

from deltawire.errors import FormatError
from deltawire.hub_server.access import Right, access_of
from deltawire.hub_server.answers import read_body, store_of
from deltawire.hub_server.batch import MAX_PATH_BYTES

BUCKET = "/api/buckets/{namespace}/{name}"
"""the route of a bucket"""
MAX_PATHS = 1000
"""As the Hub, in one paths-info request."""
_MAX_JSON_BYTES = MAX_PATHS * (MAX_PATH_BYTES + 64) * 2

_NAME = re.compile(r"[A-Za-z0-9._-]{1,96}")
_SMALL_NUMBER = re.compile(r"[0-9]{1,9}")


def bucket_id(request: Request) -> str:
    """The "namespace/name" in the request's path. Raises FormatError for a name no bucket can have."""
    return full_name(request, f"{request.path_params['namespace']}/{request.path_params['name']}")


def full_name(request: Request, text: str) -> str:
    """The "namespace/name" that a text names, where "me" stands for the token's user. Raises FormatError."""
    namespace, _, name = text.partition("/")
    if not all(_NAME.fullmatch(part) and part.strip(".") for part in (namespace, name)):
        raise FormatError(f"not a bucket name: {text!r}; it is NAMESPACE/NAME")
    return f"{own_namespace(request, namespace)}/{name}"


def own_namespace(request: Request, namespace: str) -> str:
    """The namespace, or the token's user where it is "me". Raises Unauthorized."""
    return access_of(request).require_user(request).name if namespace == "me" else namespace


def permitted(request: Request, right: Right) -> str:
    """The bucket of the request's path, which the request may read or write. Raises as `Access.check_bucket` does."""
    bucket = bucket_id(request)
    access_of(request).check_bucket(request, store_of(request).catalog, bucket, right)
    return bucket


def page_limit(request: Request) -> int:
    """How many items the request gets in one page of a listing: what it says, if the server allows as many."""
    most: int = request.app.state.page_size
    wanted = request.query_params.get("limit", "")
    return min(most, max(1, int(wanted))) if _SMALL_NUMBER.fullmatch(wanted) else most


async def json_object(request: Request) -> dict[str, Any]:
    """The fields of the request's body; none of an empty one. Raises FormatError, TooLarge."""
    body = await read_body(request, limit=_MAX_JSON_BYTES)
    try:
        fields = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        raise FormatError("the body is not JSON") from None
    if not isinstance(fields, dict):
        raise FormatError("the body is not a JSON object")
    return fields
