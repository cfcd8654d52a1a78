"""The door itself: an OpenAI-compatible application that passes each request to one engine, and its answer back."""

import asyncio
import re
from collections.abc import AsyncIterator, Collection, Coroutine, Iterable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from deltawire.errors import FormatError
from deltawire.gateway.engines import Fleet
from deltawire.gateway.routing import Engine, Floor, Known, parse_floor, prefix_of, why_none

ROUTES = {"/v1/completions": "POST", "/v1/chat/completions": "POST", "/v1/models": "GET"}
"""what is passed on; the endpoints that change weights are not"""
FLOOR = "X-Min-Policy-Version"
VERSION = "X-Policy-Version"
"""which policy an engine served when it began to answer; an engine that says it itself is believed"""
BY = "X-Served-By"
"""which engine answered, by its place in the list"""
BUSY = 503
BAD = 502
"""what a client gets for an answer that no server may pass on"""
GONE = 499
"""the status of an answer that nobody reads: the client went away"""
ASK_AGAIN = 0.1
"""seconds before an engine that is busy is asked again, if no other will do"""
MAX_BODY = 64 << 20
"""bytes of a request"""
_OURS = {"host", "content-length", "connection", "transfer-encoding", "keep-alive", "te", "upgrade", FLOOR.lower()}
_THEIRS = {"connection", "transfer-encoding", "keep-alive", "date", "server"}
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
"""bytes that no header may hold"""
_SILENT = httpx.Timeout(600.0, connect=5.0)
"""seconds without a byte after which an engine is given up"""


def build_app(engines: Sequence[Engine], *, patience: float = 30.0, poll: float = 0.5) -> Starlette:
    """A gateway before these engines. A request waits `patience` seconds for one that will do, then is refused (503).

    An engine that cannot be reached, or answers 503, hands its request to another. Once an answer has begun it is
    passed on as it comes. A client that goes away ends its request at the engine.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100, keepalive_expiry=2.0)
    http = httpx.AsyncClient(timeout=_SILENT, trust_env=False, limits=limits)
    fleet = Fleet(engines, http, poll=poll)

    @asynccontextmanager
    async def running(app: Starlette) -> AsyncIterator[None]:
        async with http, fleet.watching():
            yield

    async def health(request: Request) -> Response:
        ready = any(known.ready for known in fleet.known)
        return JSONResponse(
            {"ready": ready, "engines": [_listed(known) for known in fleet.known]}, 200 if ready else 503
        )

    door = _Door(fleet, http, [engine.url for engine in engines], patience)
    passed = [Route(path, door.handle, methods=[method]) for path, method in ROUTES.items()]
    return Starlette(routes=[Route("/health", health), *passed], lifespan=running)


class _Door:
    """Passes requests on."""

    def __init__(self, fleet: Fleet, http: httpx.AsyncClient, urls: Sequence[str], patience: float) -> None:
        self._fleet, self._http, self._urls, self._patience = fleet, http, urls, patience

    async def handle(self, request: Request) -> Response:
        """One request, to the engine that is chosen for it, or to the next if that one is not there."""
        try:
            floor = parse_floor(request.headers.get(FLOOR))
            body = await _body(request)
        except FormatError as error:
            return _refusal(400, str(error))
        prefix, tried = prefix_of(body), set[str]()
        deadline = asyncio.get_running_loop().time() + self._patience
        while True:
            known = await self._fleet.wait(prefix, floor, until=deadline, without=tried)
            if known is None and not tried:
                return _refusal(BUSY, why_none(self._fleet.known, floor))
            if known is None:
                return _refusal(BUSY, "every engine that would do is busy or gone")
            answer = await self._ask(known, request, body)
            if answer is not None:
                return answer
            tried.add(known.engine.url)
            tried = await self._again(tried, floor, deadline)

    async def _again(self, tried: set[str], floor: Floor | None, deadline: float) -> set[str]:
        """Whom not to ask next: those that were tried; but once all were, nobody, after a moment."""
        left = {known.engine.url for known in self._fleet.known if known.ready} - tried
        if left or asyncio.get_running_loop().time() + ASK_AGAIN >= deadline:
            return tried
        await asyncio.sleep(ASK_AGAIN)
        return set()

    async def _ask(self, known: Known, request: Request, body: bytes) -> Response | None:
        """An engine's answer, as it comes; None where it is gone or busy, so that another may be asked."""
        url, closing = known.engine.url, ExitStack()
        closing.enter_context(self._fleet.taking(url))
        headers = _without(request.headers.raw, _OURS)
        asked = self._http.build_request(
            request.method, url + request.url.path, content=body, headers=headers, params=request.query_params
        )
        try:
            answer = await _unless_gone(request, self._http.send(asked, stream=True))
        except httpx.LocalProtocolError as error:  # the client's headers, which no engine would take
            closing.close()
            return _refusal(400, str(error))
        except httpx.HTTPError as error:
            closing.close()
            self._fleet.failed(url, f"{url}: {error or type(error).__name__}")
            return None
        except BaseException:
            closing.close()
            raise
        if answer is None:
            closing.close()
            return Response(status_code=GONE)
        if answer.status_code == BUSY:
            await answer.aclose()
            closing.close()
            return None
        if (problem := _unfit(answer)) is not None:
            await answer.aclose()
            closing.close()
            return _refusal(BAD, f"{url}: {problem}")
        return _Passing(answer, closing, headers=_headers(answer, known, self._urls.index(url)))


class _Passing(StreamingResponse):
    """An engine's answer, byte for byte as it comes. Whatever ends this, a client that is gone too, ends the engine's
    answer and its place among those in flight."""

    def __init__(self, answer: httpx.Response, closing: ExitStack, *, headers: list[tuple[bytes, bytes]]) -> None:
        super().__init__(answer.aiter_raw(), answer.status_code)
        self.raw_headers = headers
        self._answer, self._closing = answer, closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._closing.close()
            await self._answer.aclose()


async def _unless_gone(request: Request, asking: Coroutine[Any, Any, httpx.Response]) -> httpx.Response | None:
    """What an engine answers; None once the client is gone, and then the engine is not waited for. Raises what asking
    raises."""
    asked = asyncio.ensure_future(asking)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({asked, gone}, return_when=asyncio.FIRST_COMPLETED)
        return await asked if asked.done() else None
    finally:
        for task in (asked, gone):
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task


async def _gone(request: Request) -> None:
    """Return when the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _unfit(answer: httpx.Response) -> str | None:
    """Why HTTP has no such answer, though httpx reads it; None for any other."""
    if not 200 <= answer.status_code < 600:
        return f"it answers with status {answer.status_code}, which is none"
    if bad := [name for name, value in answer.headers.raw if _CONTROL.search(value)]:
        return f"its header {bad[0].decode('ascii', 'replace')} holds a control byte"
    return None


def _headers(answer: httpx.Response, known: Known, place: int) -> list[tuple[bytes, bytes]]:
    kept = _without(answer.headers.raw, _THEIRS | {BY.lower()})
    kept.append((BY.lower().encode(), str(place).encode()))
    if known.version is not None and VERSION not in answer.headers:
        kept.append((VERSION.lower().encode(), f"{known.run}:{known.version}".encode()))
    return kept


def _without(headers: Iterable[tuple[bytes, bytes]], names: Collection[str]) -> list[tuple[bytes, bytes]]:
    """Headers but for those of these names, byte for byte: they need not be text, and a name may stand there twice."""
    lowered = ((name.lower(), value.strip(b" \t")) for name, value in headers)
    return [(name, value) for name, value in lowered if name.decode("latin-1") not in names]


async def _body(request: Request) -> bytes:
    """All of a request. Raises FormatError beyond MAX_BODY."""
    parts = bytearray()
    async for part in request.stream():
        parts += part
        if len(parts) > MAX_BODY:
            raise FormatError(f"a request of more than {MAX_BODY:,} bytes")
    return bytes(parts)


def _refusal(status: int, message: str) -> Response:
    """An error as OpenAI's clients read it."""
    error = {"message": message, "type": "service_unavailable" if status >= BAD else "invalid_request_error"}
    return JSONResponse({"error": error}, status, headers={"Retry-After": "1"} if status == BUSY else None)


def _listed(known: Known) -> dict[str, Any]:
    return {
        "url": known.engine.url,
        "ready": known.ready,
        "reason": known.reason,
        "run": known.run,
        "version": known.version,
        "in_flight": known.in_flight,
    }
