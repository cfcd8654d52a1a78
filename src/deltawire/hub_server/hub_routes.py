"""The bucket API of the Hub, as `huggingface_hub` calls it: buckets, batches, listings, events, and reading a file."""

import json
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from deltawire.errors import AccessRefused, AlreadyExists, FormatError, NotFound
from deltawire.hub_server.access import Right, access_of
from deltawire.hub_server.answers import base_url, feed_of, iso_time, parse_range, read_body, store_of, stream
from deltawire.hub_server.batch import (
    MAX_BATCH_BYTES,
    MAX_PATH_BYTES,
    DeleteFile,
    Failure,
    PutFile,
    parse_batch,
    path_problem,
)
from deltawire.hub_server.catalog import BucketInfo, Entry, Folder
from deltawire.hub_server.content import Content
from deltawire.hub_server.reconstruct import plan_range
from deltawire.hub_server.xet_hashes import EMPTY_FILE, to_text

MAX_PATHS = 1000
"""As the Hub, in one paths-info request."""
MAX_JSON_BYTES = MAX_PATHS * (MAX_PATH_BYTES + 64) * 2
Operation = PutFile | DeleteFile | Failure

_NAME = re.compile(r"[A-Za-z0-9._-]{1,96}")
_SMALL_NUMBER = re.compile(r"[0-9]{1,9}")


def bucket_id(request: Request) -> str:
    """The "namespace/name" in the request's path. Raises FormatError for a name no bucket can have."""
    namespace, name = _namespace(request), request.path_params["name"]
    if not all(_NAME.fullmatch(part) and part.strip(".") for part in (namespace, name)):
        raise FormatError(f"not a bucket name: {namespace!r}/{name!r}")
    return f"{namespace}/{name}"


def permitted(request: Request, right: Right) -> str:
    """The bucket of the request's path, which the request may read or write. Raises as `Access.check_bucket` does."""
    bucket = bucket_id(request)
    access_of(request).check_bucket(request, store_of(request).catalog, bucket, right)
    return bucket


def _namespace(request: Request) -> str:
    """The namespace of the request's path, where "me" stands for the token's user."""
    namespace: str = request.path_params["namespace"]
    return access_of(request).require_user(request).name if namespace == "me" else namespace


async def create_bucket(request: Request) -> Response:
    """POST /api/buckets/{namespace}/{name}. The client reads the url from a 409 as well."""
    fields = await _json_object(request)
    bucket, access = bucket_id(request), access_of(request)
    namespace = bucket.split("/")[0]
    access.check_namespace(request, namespace)
    answer = {"url": f"{base_url(request)}/buckets/{bucket}", "id": bucket}
    private = fields.get("visibility") == "private" or fields.get("private") is True
    if fields.get("visibility") is None and fields.get("private") is None:
        private = access.private_by_default(namespace)
    try:
        await run_in_threadpool(store_of(request).catalog.create, bucket, private=private)
    except AlreadyExists as error:
        return JSONResponse({**answer, "error": str(error)}, 409, {"X-Error-Message": str(error)})
    return JSONResponse(answer)


def bucket_info(request: Request) -> Response:
    """GET /api/buckets/{namespace}/{name}."""
    return JSONResponse(_bucket_json(store_of(request).catalog.info(permitted(request, "read"))))


def delete_bucket(request: Request) -> Response:
    """DELETE /api/buckets/{namespace}/{name}."""
    store_of(request).catalog.delete(permitted(request, "write"))
    return JSONResponse({})


def list_buckets(request: Request) -> Response:
    """GET /api/buckets/{namespace}?search=."""
    search = request.query_params.get("search", "")
    found, access = store_of(request).catalog.buckets(_namespace(request), search=search), access_of(request)
    user = access.user(request)
    return JSONResponse([_bucket_json(info) for info in found if access.sees(user, info.name, private=info.private)])


async def batch(request: Request) -> Response:
    """POST …/batch, NDJSON. 200 if anything was done, with what failed; 422 if nothing was."""
    bucket = await run_in_threadpool(permitted, request, "write")
    body = await read_body(request, limit=MAX_BATCH_BYTES)
    operations = parse_batch(body)
    failed = await run_in_threadpool(_apply, request, bucket, operations)
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
    bucket = permitted(request, "read")
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
    bucket = await run_in_threadpool(permitted, request, "read")
    fields = await _json_object(request)
    paths = fields.get("paths")
    if not isinstance(paths, list) or len(paths) > MAX_PATHS or not all(isinstance(path, str) for path in paths):
        raise FormatError(f"paths-info takes {{'paths': […]}} with at most {MAX_PATHS} strings")
    possible = [path for path in paths if path_problem(path) is None]
    found = await run_in_threadpool(store_of(request).catalog.entries, bucket, possible)
    return JSONResponse([_item_json(entry) for entry in found])


def xet_token(request: Request) -> Response:
    """GET …/xet-read-token and …/xet-write-token: where the content is, and a pass to it."""
    right: Right = "write" if request.url.path.endswith("/xet-write-token") else "read"
    bucket = permitted(request, right)
    cas, (token, expires) = base_url(request), access_of(request).issue(request, bucket, right)
    headers = {
        "X-Xet-Cas-Url": cas,
        "X-Xet-Token-Expiration": str(expires),
        "X-Xet-Access-Token": token,
    }
    return JSONResponse({"casUrl": cas, "exp": expires, "accessToken": token}, headers=headers)


def resolve(request: Request) -> Response:
    """HEAD and GET /buckets/{namespace}/{name}/resolve/{path}: metadata, or the bytes (of one range, if asked)."""
    bucket = permitted(request, "read")
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


async def events(request: Request) -> Response:
    """GET …/events?cursor=|since=: what changes in a bucket, as server-sent events."""
    bucket = await run_in_threadpool(permitted, request, "read")
    query, feed = request.query_params, feed_of(request)
    since = _milliseconds(query["since"]) if query.get("since") else None
    start = feed.start(bucket, cursor=query.get("cursor"), since_ms=since)
    headers = {"Cache-Control": "no-store"}
    return StreamingResponse(feed.stream(bucket, start), media_type="text/event-stream", headers=headers)


def whoami(request: Request) -> Response:
    """GET /api/whoami-v2."""
    user = access_of(request).require_user(request)
    orgs = [{"type": "org", "id": org.name, "name": org.name, "roleInOrg": "write"} for org in user.orgs]
    return JSONResponse({"type": "user", "id": user.name, "name": user.name, "fullname": user.name, "orgs": orgs})


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


def _apply(request: Request, bucket: str, operations: Sequence[Operation]) -> list[Failure]:
    """Do what may be done, and tell the feed. Only what is there, and open to the request, is listed or copied."""
    catalog = store_of(request).catalog
    allowed = [_allowed(request, bucket, operation) for operation in operations]
    paths = [operation.path for operation in allowed]
    before = {entry.path for entry in catalog.entries(bucket, paths)}
    failed = catalog.apply(bucket, allowed)
    after = {entry.path: entry for entry in catalog.entries(bucket, paths)}
    changes = []
    for path in dict.fromkeys(paths):
        if path in after:
            changes.append({"op": "update" if path in before else "add", **_item_json(after[path])})
        elif path in before:
            changes.append({"op": "delete", "path": path})
    feed_of(request).tell(bucket, changes)
    return failed


def _allowed(request: Request, bucket: str, operation: Operation) -> Operation:
    if not isinstance(operation, PutFile):
        return operation
    store, access = store_of(request), access_of(request)
    if not operation.copied:
        user = access.holder(request)
        known = store.content.holds(user, operation.xet_hash) or store.catalog.lists(bucket, operation.xet_hash)
        empty = operation.xet_hash == EMPTY_FILE
        return operation if known or empty else Failure(operation.path, "no file with this xetHash was uploaded")
    source = operation.source or bucket
    try:
        access.check_bucket(request, store.catalog, source, "read")
        if store.catalog.lists(source, operation.xet_hash):
            return operation
    except (NotFound, AccessRefused):
        pass
    return Failure(operation.path, f"no file with this xetHash in bucket {source}")


def _milliseconds(text: str) -> int:
    try:
        return int(datetime.fromisoformat(text).timestamp() * 1000)
    except (ValueError, OverflowError):
        raise FormatError("since is not a time in ISO 8601") from None


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
