"""The bucket API of the Hub, as `huggingface_hub` calls it: buckets, batches, listings, and reading a file over HTTP.

One local user, "me", may do everything; every other namespace is accepted too.
"""

import json
import re
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from deltawire.errors import AlreadyExists, FormatError
from deltawire.hub_server.answers import base_url, iso_time, parse_range, read_body, store_of, stream
from deltawire.hub_server.batch import MAX_BATCH_BYTES, MAX_PATH_BYTES, parse_batch, path_problem
from deltawire.hub_server.catalog import BucketInfo, Entry, Folder
from deltawire.hub_server.content import Content
from deltawire.hub_server.reconstruct import plan_range
from deltawire.hub_server.xet_hashes import to_text

MAX_PATHS = 1000
"""As the Hub, in one paths-info request."""
MAX_JSON_BYTES = MAX_PATHS * (MAX_PATH_BYTES + 64) * 2
TOKEN_SECONDS = 3600

_NAME = re.compile(r"[A-Za-z0-9._-]{1,96}")
_SMALL_NUMBER = re.compile(r"[0-9]{1,9}")


def bucket_id(request: Request) -> str:
    """The "namespace/name" in the request's path. Raises FormatError for a name no bucket can have."""
    namespace, name = request.path_params["namespace"], request.path_params["name"]
    if not all(_NAME.fullmatch(part) and part.strip(".") for part in (namespace, name)):
        raise FormatError(f"not a bucket name: {namespace!r}/{name!r}")
    return f"{namespace}/{name}"


async def create_bucket(request: Request) -> Response:
    """POST /api/buckets/{namespace}/{name}. The client reads the url from a 409 as well."""
    fields = await _json_object(request)
    bucket = bucket_id(request)
    answer = {"url": f"{base_url(request)}/buckets/{bucket}", "id": bucket}
    private = fields.get("visibility") == "private" or fields.get("private") is True
    try:
        await run_in_threadpool(store_of(request).catalog.create, bucket, private=private)
    except AlreadyExists as error:
        return JSONResponse({**answer, "error": str(error)}, 409, {"X-Error-Message": str(error)})
    return JSONResponse(answer)


def bucket_info(request: Request) -> Response:
    """GET /api/buckets/{namespace}/{name}."""
    return JSONResponse(_bucket_json(store_of(request).catalog.info(bucket_id(request))))


def delete_bucket(request: Request) -> Response:
    """DELETE /api/buckets/{namespace}/{name}."""
    store_of(request).catalog.delete(bucket_id(request))
    return JSONResponse({})


def list_buckets(request: Request) -> Response:
    """GET /api/buckets/{namespace}?search=."""
    search = request.query_params.get("search", "")
    found = store_of(request).catalog.buckets(request.path_params["namespace"], search=search)
    return JSONResponse([_bucket_json(info) for info in found])


async def batch(request: Request) -> Response:
    """POST …/batch, NDJSON. 200 if anything was done, with what failed; 422 if nothing was."""
    body = await read_body(request, limit=MAX_BATCH_BYTES)
    operations = parse_batch(body)
    failed = await run_in_threadpool(store_of(request).catalog.apply, bucket_id(request), operations)
    done = len(operations) - len(failed)
    answer = {
        "success": not failed,
        "processed": len(operations),
        "succeeded": done,
        "failed": [{"path": failure.path, "error": failure.error} for failure in failed],
    }
    return JSONResponse(answer, 422 if failed and not done else 200)


def tree(request: Request) -> Response:
    """GET …/tree[/{prefix}]?recursive=&limit=&cursor=, a page at a time; the Link header names the next."""
    bucket = bucket_id(request)
    prefix = request.path_params.get("prefix", "")
    query = request.query_params
    recursive = query.get("recursive", "false").lower() in ("true", "1")
    page_size: int = request.app.state.page_size
    wanted = query.get("limit", "")
    limit = min(page_size, max(1, int(wanted))) if _SMALL_NUMBER.fullmatch(wanted) else page_size
    page = store_of(request).catalog.list(
        bucket, prefix, recursive=recursive, start=query.get("cursor", ""), limit=limit
    )
    headers = {}
    if page.next_start is not None:
        path = f"/api/buckets/{bucket}/tree" + (f"/{quote(prefix, safe='')}" if prefix else "")
        cursor = quote(page.next_start, safe="")
        link = f"{base_url(request)}{path}?recursive={str(recursive).lower()}&limit={limit}&cursor={cursor}"
        headers["Link"] = f'<{link}>; rel="next"'
    return JSONResponse([_item_json(item) for item in page.items], headers=headers)


async def paths_info(request: Request) -> Response:
    """POST …/paths-info {"paths": […]}; paths without a file are left out."""
    fields = await _json_object(request)
    paths = fields.get("paths")
    if not isinstance(paths, list) or len(paths) > MAX_PATHS or not all(isinstance(path, str) for path in paths):
        raise FormatError(f"paths-info takes {{'paths': […]}} with at most {MAX_PATHS} strings")
    possible = [path for path in paths if path_problem(path) is None]
    found = await run_in_threadpool(store_of(request).catalog.entries, bucket_id(request), possible)
    return JSONResponse([_item_json(entry) for entry in found])


def xet_token(request: Request) -> Response:
    """GET …/xet-read-token and …/xet-write-token: where the content is. The token itself is not looked at again."""
    store_of(request).catalog.require(bucket_id(request))
    cas, expires, token = base_url(request), int(time.time()) + TOKEN_SECONDS, "local"
    headers = {
        "X-Xet-Cas-Url": cas,
        "X-Xet-Token-Expiration": str(expires),
        "X-Xet-Access-Token": token,
    }
    return JSONResponse({"casUrl": cas, "exp": expires, "accessToken": token}, headers=headers)


def resolve(request: Request) -> Response:
    """HEAD and GET /buckets/{namespace}/{name}/resolve/{path}: metadata, or the bytes (of one range, if asked)."""
    bucket = bucket_id(request)
    entry = store_of(request).catalog.entry(bucket, request.path_params["path"])
    xet_hash = to_text(entry.xet_hash)
    headers = {
        "Content-Type": entry.content_type or "application/octet-stream",
        "ETag": f'"{xet_hash}"',
        "X-Xet-Hash": xet_hash,
        "X-Linked-Size": str(entry.size),
        "X-Linked-ETag": f'"{xet_hash}"',
        "Link": f'<{base_url(request)}/api/buckets/{bucket}/xet-read-token>; rel="xet-auth"',
        "Accept-Ranges": "bytes",
    }
    span = parse_range(request.headers.get("range"), entry.size) if request.method == "GET" else None
    start, stop = span or (0, entry.size)
    headers["Content-Length"] = str(stop - start)
    if span:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{entry.size}"
    if request.method == "HEAD" or start == stop:
        return Response(headers=headers)
    content = store_of(request).content
    return stream(_read(content, entry, start, stop), status=206 if span else 200, headers=headers)


def events(request: Request) -> Response:
    """GET …/events: this server has no event feed; on 501 the client quietly goes without."""
    message = "this server has no event feed; poll instead"
    return JSONResponse({"error": message}, 501, {"X-Error-Message": message})


def whoami(request: Request) -> Response:
    """GET /api/whoami-v2."""
    return JSONResponse({"type": "user", "id": "me", "name": "me", "fullname": "Local user", "orgs": []})


BUCKET = "/api/buckets/{namespace}/{name}"
ROUTES = [
    Route("/api/whoami-v2", whoami),
    Route("/api/buckets/{namespace}", list_buckets),
    Route(BUCKET, create_bucket, methods=["POST"]),
    Route(BUCKET, bucket_info),
    Route(BUCKET, delete_bucket, methods=["DELETE"]),
    Route(f"{BUCKET}/batch", batch, methods=["POST"]),
    Route(f"{BUCKET}/paths-info", paths_info, methods=["POST"]),
    Route(f"{BUCKET}/tree", tree),
    Route(f"{BUCKET}/tree/{{prefix:path}}", tree),
    Route(f"{BUCKET}/xet-read-token", xet_token),
    Route(f"{BUCKET}/xet-write-token", xet_token),
    Route(f"{BUCKET}/events", events),
    Route("/buckets/{namespace}/{name}/resolve/{path:path}", resolve),
]


def _read(content: Content, entry: Entry, start: int, stop: int) -> Iterator[bytes]:
    plan = plan_range(content.segments(entry.xet_hash), start, stop, content.xorb_table)
    return content.read(plan)


def _bucket_json(info: BucketInfo) -> dict[str, Any]:
    return {
        "id": info.name,
        "private": info.private,
        "createdAt": iso_time(info.created_ms),
        "size": info.size,
        "totalFiles": info.files,
    }


def _item_json(item: Entry | Folder) -> dict[str, Any]:
    if isinstance(item, Folder):
        return {"type": "directory", "path": item.path, "uploadedAt": iso_time(item.uploaded_ms)}
    described = {
        "type": "file",
        "path": item.path,
        "size": item.size,
        "xetHash": to_text(item.xet_hash),
        "mtime": iso_time(item.mtime_ms),
        "uploadedAt": iso_time(item.uploaded_ms),
    }
    return described | ({"contentType": item.content_type} if item.content_type else {})


async def _json_object(request: Request) -> dict[str, Any]:
    body = await read_body(request, limit=MAX_JSON_BYTES)
    try:
        fields = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        raise FormatError("the body is not JSON") from None
    if not isinstance(fields, dict):
        raise FormatError("the body is not a JSON object")
    return fields
