"""The page at / of a bucket server, handed in where the server is started: this package draws none."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

PATHS = ("/", "/status.json", "/events")


class Said(Protocol):
    """An answer: a status, a media type, headers, and a body, whole or as it comes."""

    @property
    def status(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def body(self) -> bytes | Iterator[bytes]: ...
    @property
    def headers(self) -> Mapping[str, str]: ...


class Home(Protocol):
    """What answers GETs of `PATHS`; `close` ends its streams."""

    def answer(self, path: str, query: str, /) -> Said | None: ...
    def close(self) -> None: ...


def routes(home: Home) -> list[Route]:
    """The routes of a page."""

    async def get(request: Request) -> Response:
        found: Any = await run_in_threadpool(home.answer, request.url.path, request.url.query)
        if found is None:
            return JSONResponse({"error": f"{request.url.path} is not here"}, 404)
        kind = StreamingResponse if not isinstance(found.body, bytes) else Response
        return kind(found.body, found.status, dict(found.headers), found.kind)

    return [Route(path, get, methods=["GET"]) for path in PATHS]
