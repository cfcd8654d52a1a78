"""A stand-in for vLLM that writes what a script says, token by token, and can be broken as servers break."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from examples.wordle.model import build_tokenizer

TOKENIZER = build_tokenizer()
Script = Callable[[Sequence[int]], str]


class Completions:
    """Answers `/v1/completions` with the lines of `script`, which sees each prompt, cut to `max_tokens`.

    Token n of a line has log-probability -n. `/weight_info` tells `versions` one by one, the last forever.
    """

    def __init__(self, script: Script, versions: Sequence[str] = ("default",)) -> None:
        self.script = script
        self.versions = list(versions)
        self.requests: list[dict[str, Any]] = []
        self.fault: int | None = None
        self.dev_mode = True

    async def weight_info(self, request: web.Request) -> web.Response:
        if not self.dev_mode:
            return web.json_response({"detail": "Not Found"}, status=404)
        version = self.versions.pop(0) if len(self.versions) > 1 else self.versions[0]
        return web.json_response({"weight_version": version})

    async def complete(self, request: web.Request) -> web.Response:
        asked = await request.json()
        self.requests.append(asked)
        if self.fault is not None:
            return web.json_response({"error": {"message": "the engine is dead"}}, status=self.fault)
        lines = [TOKENIZER.encode(self.script(prompt))[: asked["max_tokens"]] for prompt in asked["prompt"]]
        choices = [
            {"index": i, "token_ids": line, "logprobs": {"token_logprobs": [-float(n) for n in range(len(line))]}}
            for i, line in enumerate(lines)
        ]
        return web.json_response({"choices": choices[::-1]})  # vLLM promises no order

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        """The URL, while it answers."""
        app = web.Application()
        app.router.add_get("/weight_info", self.weight_info)
        app.router.add_post("/v1/completions", self.complete)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()
