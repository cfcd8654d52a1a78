"""What is in a bucket, as `huggingface_hub` asks for it: batches, listings, events, and reading a file."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from deltawire.errors import AccessRefused, FormatError, NotFound
from deltawire.hub_server.access import Right, access_of
from deltawire.hub_server.answers import (
    base_url,
    feed_of,
    iso_time,
    next_page,
    parse_range,
    read_body,
    store_of,
    stream,
)
from deltawire.hub_server.asked import BUCKET, MAX_PATHS, json_object, page_limit, permitted
from deltawire.hub_server.batch import (
    MAX_BATCH_BYTES,
    DeleteFile,
    Failure,
    PutFile,
    parse_batch,
    path_problem,
)
from deltawire.hub_server.catalog import Entry, Folder
from deltawire.hub_server.content import Content
from deltawire.hub_server.reconstruct import reconstruct_range
from deltawire.hub_server.xet_hashes import EMPTY_FILE, to_text

Operation = PutFile | DeleteFile | Failure


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
    """GET …/tree[/{prefix}]?recursive=&limit=&cursor=, a page at a time; the Link header names the next.

    As on the Hub, only `recursive=false` asks for folders: who says nothing gets every file.
    """
    bucket = permitted(request, "read")
    prefix = request.path_params.get("prefix", "")
    query = request.query_params
    recursive = query.get("recursive", "true").lower() in ("true", "1")
    limit = page_limit(request)
    page = store_of(request).catalog.list(
        bucket, prefix, recursive=recursive, start=query.get("cursor", ""), limit=limit
    )
    path = f"/api/buckets/{bucket}/tree" + (f"/{quote(prefix, safe='')}" if prefix else "")
    headers = next_page(request, path, page.next_start, recursive=str(recursive).lower(), limit=limit)
    return JSONResponse([_item_json(item) for item in page.items], headers=headers)


async def paths_info(request: Request) -> Response:
    """POST …/paths-info {"paths": […]}; paths without a file are left out."""
    bucket = await run_in_threadpool(permitted, request, "read")
    fields = await json_object(request)
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


ROUTES = [
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
    reconstruction = reconstruct_range(content.segments(entry.xet_hash), start, stop, content.xorb_table)
    return content.read(reconstruction)


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
