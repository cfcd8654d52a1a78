"""The buckets themselves, as `huggingface_hub` asks for them: made, described, listed, moved, deleted."""

from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from deltawire.errors import AlreadyExists, FormatError, NotFound
from deltawire.hub_server.access import access_of
from deltawire.hub_server.answers import base_url, feed_of, iso_time, next_page, store_of
from deltawire.hub_server.asked import BUCKET, bucket_id, full_name, json_object, own_namespace, page_limit, permitted
from deltawire.hub_server.catalog import BucketInfo

_GIT_KINDS = ("models", "datasets", "spaces")


async def create_bucket(request: Request) -> Response:
    """POST /api/buckets/{namespace}/{name}. The client reads the url from a 409 as well."""
    bucket, access = bucket_id(request), access_of(request)
    namespace = bucket.split("/")[0]
    access.check_namespace(request, namespace)
    fields = await json_object(request)
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
    bucket = permitted(request, "write")
    store_of(request).catalog.delete(bucket)
    feed_of(request).end(bucket)
    return JSONResponse({})


async def move_bucket(request: Request) -> Response:
    """POST /api/repos/move {"fromRepo", "toRepo", "type": "bucket"}: another name, in this namespace or another."""
    access_of(request).require_user(request)
    fields = await json_object(request)
    if fields.get("type") != "bucket":
        raise NotFound("this server has buckets and no git repositories: type must be bucket")
    source, target = (full_name(request, str(fields.get(field))) for field in ("fromRepo", "toRepo"))
    await run_in_threadpool(_move, request, source, target)
    return JSONResponse({})


def _move(request: Request, source: str, target: str) -> None:
    access, catalog = access_of(request), store_of(request).catalog
    access.check_bucket(request, catalog, source, "write")
    access.check_namespace(request, target.split("/", maxsplit=1)[0])
    catalog.rename(source, target)
    feed_of(request).end(source)


async def change_settings(request: Request) -> Response:
    """PUT /api/buckets/{namespace}/{name}/settings {"private"}."""
    bucket = await run_in_threadpool(permitted, request, "write")
    private = (await json_object(request)).get("private")
    if not isinstance(private, bool):
        raise FormatError("the settings of a bucket are {'private': true or false}")
    await run_in_threadpool(store_of(request).catalog.set_private, bucket, private=private)
    feed_of(request).end(bucket)
    return JSONResponse({"private": private})


def list_buckets(request: Request) -> Response:
    """GET /api/buckets/{namespace}?search=&limit=&cursor=, a page at a time; the Link header names the next.

    An empty list for a namespace that is there; NotFound where the path names none, say a bucket's name alone.
    """
    namespace, query = own_namespace(request, request.path_params["namespace"]), request.query_params
    access, limit, search = access_of(request), page_limit(request), query.get("search", "")
    private = access.sees_private(access.user(request), namespace)
    found = store_of(request).catalog.buckets(
        namespace, private=private, search=search, after=query.get("cursor", ""), limit=limit + 1
    )
    if not found and not query and not access.knows_namespace(namespace):
        raise NotFound(f"there is no user or organisation {namespace}; a bucket is named NAMESPACE/NAME")
    last = found[limit - 1].name if len(found) > limit else None
    headers = next_page(request, f"/api/buckets/{namespace}", last, search=search, limit=limit)
    return JSONResponse([_bucket_json(info) for info in found[:limit]], headers=headers)


def no_bucket_named(request: Request) -> Response:
    """DELETE /api/buckets/{name}."""
    raise NotFound(f"no bucket is named {request.path_params['namespace']}; a bucket is named NAMESPACE/NAME")


def no_repository(request: Request) -> Response:
    """What asks for a model, a dataset or a Space.

    Not "RepoNotFound": transformers falls back to its cache after any other 404, and so goes on with a cached model.
    """
    raise NotFound(f"this server has buckets and no git repositories: nothing is at {request.url.path}")


def whoami(request: Request) -> Response:
    """GET /api/whoami-v2."""
    user = access_of(request).require_user(request)
    orgs = [{"type": "org", "id": org.name, "name": org.name, "roleInOrg": "write"} for org in user.orgs]
    auth = {"type": "access_token", "accessToken": {"displayName": f"deltawire-{user.name}", "role": "write"}}
    who = {"type": "user", "id": user.name, "name": user.name, "fullname": user.name, "orgs": orgs, "auth": auth}
    return JSONResponse(who)


ROUTES = [
    Route("/api/whoami-v2", whoami),
    Route("/api/buckets/{namespace}", list_buckets),
    Route("/api/buckets/{namespace}", no_bucket_named, methods=["DELETE"]),
    Route(BUCKET, create_bucket, methods=["POST"]),
    Route(BUCKET, bucket_info),
    Route(BUCKET, delete_bucket, methods=["DELETE"]),
    Route(f"{BUCKET}/settings", change_settings, methods=["PUT"]),
    Route("/api/repos/move", move_bucket, methods=["POST"]),
    Route("/api/repos/create", no_repository, methods=["POST"]),
    *(Route(f"/api/{kind}/{{rest:path}}", no_repository) for kind in _GIT_KINDS),
    Route("/{repository:path}/resolve/{rest:path}", no_repository),
]


def _bucket_json(info: BucketInfo) -> dict[str, Any]:
    return {
        "id": info.name,
        "private": info.private,
        "createdAt": iso_time(info.created_ms),
        "size": info.size,
        "totalFiles": info.files,
    }
