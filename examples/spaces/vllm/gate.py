"""Lets rollouts through to a vLLM on loopback, for those who name its key, and nothing else of what dev mode opens.

    VLLM_API_KEY=… python gate.py --port 7860

vLLM's own key guards /v1, /v2, /inference and /cohere only: /collective_rpc, /update_weights, /pause and the other
endpoints of dev mode answer whoever reaches the port. Here a path is either in `ROUTES` or 404. While a follower with
`--pause wait` or `abort` writes, vLLM 0.33 answers new requests 503: they are asked again here.
"""

import argparse
import asyncio
import hmac
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

ROUTES = {
    "/v1/completions": "POST",
    "/v1/chat/completions": "POST",
    "/v1/models": "GET",
    "/weight_info": "GET",
}
"""what leaves this host: answers to prompts, and which weights give them"""
TIMEOUT = httpx.Timeout(300.0, connect=5.0)
BUSY = 503
ASK_AGAIN = 0.1
"""seconds between requests to a vLLM that is busy"""


def build_app(engine: str, health: str, key: str, *, patience: float = 30.0) -> Starlette:
    """The gate before `engine`, which is asked again for `patience` seconds while it is busy; /health answers what the
    follower says at `health`, to everybody."""
    http = httpx.AsyncClient(timeout=TIMEOUT, trust_env=False, limits=httpx.Limits(keepalive_expiry=2.0))
    wanted = f"Bearer {key}".encode()

    async def ask(method: str, url: str, content: bytes = b"") -> Response:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        try:
            answer = await http.request(method, url, content=content, headers=headers)
        except httpx.HTTPError as error:
            return PlainTextResponse(f"not ready: {type(error).__name__}", 503)
        return Response(answer.content, answer.status_code, media_type=answer.headers.get("Content-Type"))

    def passing(path: str) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            if not hmac.compare_digest(request.headers.get("Authorization", "").encode(), wanted):
                return PlainTextResponse("the key is missing or wrong", 401)
            body, deadline = await request.body(), time.monotonic() + patience
            while True:
                answer = await ask(request.method, engine + path, body)
                if answer.status_code != BUSY or answer.media_type == "text/plain" or time.monotonic() >= deadline:
                    return answer
                await asyncio.sleep(ASK_AGAIN)

        return handle

    async def ready(request: Request) -> Response:
        return await ask("GET", health)

    @asynccontextmanager
    async def closing(app: Starlette) -> AsyncIterator[None]:
        async with http:
            yield

    routes = [Route("/health", ready), *(Route(path, passing(path), methods=[ROUTES[path]]) for path in ROUTES)]
    return Starlette(routes=routes, lifespan=closing)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--engine", default="http://127.0.0.1:8000", help="vLLM, on loopback")
    parser.add_argument("--health", default="http://127.0.0.1:8001/health", help="where the follower tells its health")
    arguments = parser.parse_args()
    key = os.environ.get("VLLM_API_KEY", "")
    if len(key) < 16:
        print("gate: VLLM_API_KEY must be set, to 16 characters or more: rollouts have to name it", file=sys.stderr)
        return 2
    app = build_app(arguments.engine, arguments.health, key)
    uvicorn.run(app, host=arguments.host, port=arguments.port, log_level="warning")
    return 0


if __name__ == "__main__":
    sys.exit(main())
