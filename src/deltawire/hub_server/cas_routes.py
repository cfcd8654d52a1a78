"""The content-addressed API of Xet, as `hf_xet` calls it: dedup queries, xorbs in, shards in, reconstructions and xorb
ranges out.

A xorb is checked by decoding it and hashing what comes out, so the CRC-64 a grant also carries would add nothing.
"""

import json
from dataclasses import asdict
from functools import partial

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from deltawire.errors import FormatError, NotFound, TooLarge
from deltawire.hub_server.access import access_of
from deltawire.hub_server.answers import base_url, parse_range, read_body, save_body, store_of
from deltawire.hub_server.content import total_size
from deltawire.hub_server.grants import Grants
from deltawire.hub_server.reconstruct import as_json, reconstruct_range
from deltawire.hub_server.shards import MAX_SHARD_BYTES
from deltawire.hub_server.xet_hashes import from_text
from deltawire.hub_server.xorbs import MAX_CHUNKS, MAX_XORB_BYTES

_XORB_BYTES = "/v1/xorb-bytes"
_MAX_UPLOAD_BYTES = MAX_XORB_BYTES + 1024 * 1024
"""A footer, at most some 90 bytes a chunk, may follow the chunks."""


class XorbResponse(FileResponse):
    """Ranges of a xorb, in pieces large enough that handing them over costs nothing."""

    chunk_size = 1024 * 1024
    max_ranges = MAX_CHUNKS


def dedup(request: Request) -> Response:
    """GET /v1/chunks/{prefix}/{chunk}: a shard that names stored xorbs, or 404."""
    user = _holder(request)
    shard = store_of(request).content.dedup_shard(from_text(request.path_params["chunk"]), user=user)
    return Response(shard, media_type="application/octet-stream")


async def grant_xorb(request: Request) -> Response:
    """POST /v1/xorb-grants/default/{xorb}: 201 with where to send it, or 200 if it is stored already."""
    user = _holder(request)
    body = await read_body(request, limit=64 * 1024)
    xorb = from_text(request.path_params["xorb"])
    if _announced_length(body) > _MAX_UPLOAD_BYTES:
        raise TooLarge(f"xorb {request.path_params['xorb']} is longer than {MAX_XORB_BYTES} bytes")
    store = store_of(request)
    try:
        table = await run_in_threadpool(store.content.xorb_table, xorb)
        if not await run_in_threadpool(store.content.holds, user, xorb):
            raise NotFound("not sent by this user")
    except NotFound:
        grant = _grants(request).issue(xorb)
        url = f"{base_url(request)}/v1/xorb-uploads/{grant}"
        headers = {"content-type": "application/octet-stream"}
        return JSONResponse({"id": grant, "method": "PUT", "url": url, "headers": headers}, 201)
    store.count(deduplicated=table.raw_offsets[-1])
    return JSONResponse({})


async def upload_granted(request: Request) -> Response:
    """PUT /v1/xorb-uploads/{grant}: hold the body until it is committed."""
    grants, grant = _grants(request), request.path_params["grant"]
    grants.check(grant)
    store = store_of(request)
    staged = store.new_staging_path()
    store.count(received=await save_body(request, staged, limit=_MAX_UPLOAD_BYTES))
    await run_in_threadpool(grants.stage, grant, staged)
    return Response()


def commit_granted(request: Request) -> Response:
    """POST /v1/xorb-commits/default/{xorb}/grant/{grant}: verify what was held and store it."""
    user = _holder(request)
    xorb = from_text(request.path_params["xorb"])
    staged = _grants(request).take(request.path_params["grant"], xorb)
    return JSONResponse({"was_inserted": store_of(request).content.add_xorb(xorb, staged, user=user)})


async def upload_xorb(request: Request) -> Response:
    """POST /v1/xorbs/default/{xorb}: the way without a grant."""
    user = _holder(request)
    xorb = from_text(request.path_params["xorb"])
    store = store_of(request)
    staged = store.new_staging_path()
    store.count(received=await save_body(request, staged, limit=_MAX_UPLOAD_BYTES))
    inserted = await run_in_threadpool(partial(store.content.add_xorb, xorb, staged, user=user))
    return JSONResponse({"was_inserted": inserted})


async def upload_shard_v1(request: Request) -> Response:
    """POST /v1/shards: verify and register."""
    await _register_shard(request)
    return JSONResponse({"result": 1})


async def upload_shard_v2(request: Request) -> Response:
    """POST /v2/shards: the same, answered in lines of JSON, of which the last tells the result."""
    await _register_shard(request)
    return Response(json.dumps({"type": "result"}) + "\n", media_type="application/x-ndjson")


def reconstruction_v1(request: Request) -> Response:
    """GET /v1/reconstructions/{file}: which chunks hold the file, or the range of it that is asked for."""
    return _reconstruction(request, version=1)


def reconstruction_v2(request: Request) -> Response:
    """GET /v2/reconstructions/{file}: the same, with all ranges of a xorb under one URL."""
    return _reconstruction(request, version=2)


async def _register_shard(request: Request) -> None:
    user = _holder(request)
    body = await read_body(request, limit=MAX_SHARD_BYTES)
    store = store_of(request)
    store.count(received=len(body))
    try:
        deduplicated = await run_in_threadpool(partial(store.content.add_shard, body, user=user))
    except NotFound as error:
        # 404 would tell the client that there is no such API, and make it try the older one.
        raise FormatError(str(error)) from error
    store.count(deduplicated=deduplicated)


def _reconstruction(request: Request, *, version: int) -> Response:
    content, file = store_of(request).content, from_text(request.path_params["file"])
    access, visitor = access_of(request), access_of(request).visitor(request, "read")
    if visitor is not None:
        open_to = content.holds(visitor.user, file) or store_of(request).catalog.lists(visitor.bucket, file)
        if not open_to:
            raise NotFound(f"bucket {visitor.bucket} has no file with hash {request.path_params['file']}")
    segments = content.segments(file)
    size = total_size(segments)
    start, stop = parse_range(request.headers.get("range"), size) or (0, size)
    reconstruction = reconstruct_range(segments, start, stop, content.xorb_table)
    answer = as_json(
        reconstruction,
        version=version,
        table_of=content.xorb_table,
        url_of=lambda name: f"{base_url(request)}{_XORB_BYTES}/{name}{access.sign_address(f'{_XORB_BYTES}/{name}')}",
    )
    return JSONResponse(answer)


def xorb_bytes(request: Request) -> Response:
    """GET /v1/xorb-bytes/{xorb}: ranges of a xorb as it was sent. Needs no token: the address is signed."""
    access_of(request).check_address(request)
    content = store_of(request).content
    xorb = from_text(request.path_params["xorb"])
    if not content.has_xorb(xorb):
        raise NotFound(f"xorb {request.path_params['xorb']} is not stored here")
    return XorbResponse(content.xorb_path(xorb), media_type="application/octet-stream")


async def telemetry(request: Request) -> Response:
    """POST /v1/telemetry: taken and dropped."""
    await read_body(request, limit=1024 * 1024)
    return Response()


def stats(request: Request) -> Response:
    """GET /_deltawire/stats: the counters, as JSON."""
    access_of(request).require_user(request)
    return JSONResponse(asdict(store_of(request).stats()))


def _holder(request: Request) -> str | None:
    """Who sends content; None on a server without users. Raises Unauthorized, Forbidden."""
    visitor = access_of(request).visitor(request, "write")
    return None if visitor is None else visitor.user


def _grants(request: Request) -> Grants:
    grants: Grants = request.app.state.grants
    return grants


def _announced_length(body: bytes) -> int:
    try:
        length = json.loads(body).get("length", 0)
        return int(length)
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise FormatError("a grant request is a JSON object with a length") from None


ROUTES = [
    Route("/v1/chunks/default/{chunk}", dedup),
    Route("/v1/chunks/default-merkledb/{chunk}", dedup),
    Route("/v1/xorb-grants/default/{xorb}", grant_xorb, methods=["POST"]),
    Route("/v1/xorb-uploads/{grant}", upload_granted, methods=["PUT"]),
    Route("/v1/xorb-commits/default/{xorb}/grant/{grant}", commit_granted, methods=["POST"]),
    Route("/v1/xorbs/default/{xorb}", upload_xorb, methods=["POST"]),
    Route("/v1/shards", upload_shard_v1, methods=["POST"]),
    Route("/v2/shards", upload_shard_v2, methods=["POST"]),
    Route("/v1/reconstructions/{file}", reconstruction_v1),
    Route("/v2/reconstructions/{file}", reconstruction_v2),
    Route(f"{_XORB_BYTES}/{{xorb}}", xorb_bytes),
    Route("/v1/telemetry", telemetry, methods=["POST"]),
    Route("/_deltawire/stats", stats),
]
