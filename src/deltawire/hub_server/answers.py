"""How requests come in and outcomes go out: bounded bodies, byte ranges, and refusals in the form of the Hub."""

import re
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime
from io import FileIO
from itertools import chain
from pathlib import Path
from urllib.parse import urlencode

from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deltawire.errors import (
    AccessRefused,
    AlreadyExists,
    DeltaWireError,
    FormatError,
    NotFound,
    OutOfSpace,
    TooLarge,
    Unavailable,
)
from deltawire.hub_server.access import Unauthorized
from deltawire.hub_server.catalog import BucketMissing, EntryMissing
from deltawire.hub_server.durable import no_space_is_typed
from deltawire.hub_server.events import Feed
from deltawire.hub_server.store import Store
from deltawire.hub_server.xorbs import Damaged

_WRITE_BYTES = 4 * 1024 * 1024
_SEND_BYTES = 1024 * 1024
_HEADER_CHARS = 2000
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")

_STATUS: tuple[tuple[type[DeltaWireError], int, str | None], ...] = (
    (BucketMissing, 404, "RepoNotFound"),
    (EntryMissing, 404, "EntryNotFound"),
    (NotFound, 404, None),
    (AlreadyExists, 409, None),
    (TooLarge, 413, None),
    (Damaged, 500, None),
    (FormatError, 400, None),
    (OutOfSpace, 507, None),
    (Unauthorized, 401, None),
    (AccessRefused, 403, None),
    (Unavailable, 503, None),
)


class RangeNotSatisfiable(DeltaWireError):
    """The range asked for lies outside the file."""

    def __init__(self, size: int) -> None:
        super().__init__(f"the range lies outside the file, which has {size} bytes")
        self.size = size


def store_of(request: Request) -> Store:
    """The store the application was made with."""
    store: Store = request.app.state.store
    return store


def feed_of(request: Request) -> Feed:
    """The feed of changes the application was made with."""
    feed: Feed = request.app.state.feed
    return feed


def base_url(request: Request) -> str:
    """The address the client used, without a trailing slash: links in answers lead back the same way."""
    return str(request.base_url).rstrip("/")


def next_page(request: Request, path: str, cursor: str | None, **query: object) -> dict[str, str]:
    """The header that names the next page of a listing, which begins at `cursor`; none after the last."""
    if cursor is None:
        return {}
    link = f"{base_url(request)}{path}?{urlencode({**query, 'cursor': cursor})}"
    return {"Link": f'<{link}>; rel="next"'}


def refusal(request: Request, error: Exception) -> Response:
    """The answer to a request that failed with one of deltawire's errors."""
    for kind, status, code in _STATUS:
        if isinstance(error, kind):
            return _refuse(status, str(error), code)
    return _refuse(500, str(error), None)


def http_refusal(request: Request, error: Exception) -> Response:
    """The answer to a request for a route or method that does not exist."""
    assert isinstance(error, HTTPException)
    return _refuse(error.status_code, f"{request.method} {request.url.path}: {error.detail}", None)


def range_refusal(request: Request, error: Exception) -> Response:
    """The answer to a range that lies outside the file."""
    assert isinstance(error, RangeNotSatisfiable)
    response = _refuse(416, str(error), None)
    response.headers["Content-Range"] = f"bytes */{error.size}"
    return response


def nobody_there(request: Request, error: Exception) -> Response:
    """The answer to a client that hung up while it was sending: nobody reads it."""
    return Response(status_code=400)


def _refuse(status: int, message: str, code: str | None) -> Response:
    headers = {"X-Error-Message": message.encode("unicode_escape").decode()[:_HEADER_CHARS]}
    if code is not None:
        headers["X-Error-Code"] = code
    return JSONResponse({"error": message}, status, headers)


def iso_time(milliseconds: int) -> str:
    """A time as the Hub writes it, to the millisecond, in UTC."""
    moment = datetime.fromtimestamp(milliseconds / 1000, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{milliseconds % 1000:03d}Z"


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """The one byte range asked for as (start, stop), cut to the file; None if there is none or it is not understood.

    Raises RangeNotSatisfiable when nothing of the file is in it.
    """
    found = _RANGE.fullmatch(header or "")
    if found is None or found[0] == "bytes=-":
        return None
    first, last = found[1], found[2]
    if first:
        start, stop = int(first), min(size, int(last) + 1 if last else size)
    else:
        start, stop = max(0, size - int(last)), size
    if start >= stop:
        raise RangeNotSatisfiable(size)
    return start, stop


async def read_body(request: Request, *, limit: int) -> bytes:
    """The whole body. Raises TooLarge as soon as it is known to exceed `limit` bytes."""
    _check_announced(request, limit)
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise TooLarge(f"the body is longer than {limit} bytes")
    return bytes(body)


async def save_body(request: Request, path: Path, *, limit: int) -> int:
    """Write the body to a new file and return its length. Raises TooLarge, OutOfSpace; then no file is left."""
    _check_announced(request, limit)
    length = 0
    waiting = bytearray()
    try:
        with no_space_is_typed(path.parent), path.open("xb", buffering=0) as file:
            async for piece in request.stream():
                waiting += piece
                length += len(piece)
                if length > limit:
                    raise TooLarge(f"the body is longer than {limit} bytes")
                if len(waiting) >= _WRITE_BYTES:
                    await run_in_threadpool(_write_all, file, waiting)
                    waiting = bytearray()
            await run_in_threadpool(_write_all, file, waiting)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return length


def _write_all(file: FileIO, data: bytearray) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _check_announced(request: Request, limit: int) -> None:
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > limit:
        raise TooLarge(f"the body has {announced} bytes; {limit} is the most")


def stream(pieces: Iterator[bytes], *, status: int, headers: dict[str, str]) -> Response:
    """An answer made piece by piece in a worker thread, joined to about a megabyte. `headers` give type and length.

    The first megabyte is made at once, so that what fails there fails while a refusal can still be sent.
    """
    joined = _joined(pieces)
    body = chain([next(joined)], joined)
    return StreamingResponse(iterate_in_threadpool(body), status, headers)


def _joined(pieces: Iterator[bytes]) -> Iterator[bytes]:
    waiting = bytearray()
    for piece in pieces:
        waiting += piece
        if len(waiting) >= _SEND_BYTES:
            yield bytes(waiting)
            waiting.clear()
    yield bytes(waiting)


class RequestIds:
    """Gives every answer an X-Request-Id, as the Hub does: the client shows it in its errors."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = secrets.token_hex(16)
            await send(message)

        await self._app(scope, receive, send_with_id)


class WholeAddresses:
    """Takes "GET http://host/path", which HTTP allows and uvicorn hands on as it is, for "GET /path"."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        if scope["type"] == "http" and scope["path"].startswith(("http://", "https://")):
            scope = {**scope, "path": "/" + scope["path"].partition("://")[2].partition("/")[2]}
        await self._app(scope, receive, send)
