"""A stand-in for vLLM that writes what a script says, token by token, and can be broken as servers break."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from examples.wordle.model import build_tokenizer
from transformers import PreTrainedTokenizerFast

TOKENIZER = build_tokenizer()
Script = Callable[[Sequence[int]], str]


class Completions:
    """Answers `/v1/completions` with the lines of `script`, which sees each prompt, cut to `max_tokens`. So it answers
    `/v1/chat/completions`, by the tokenizer's chat template.

    Token n of a line has log-probability -n. `/weight_info` tells `versions` one by one, the last forever. `made_by`,
    if there are any, are the versions that vLLM 0.33 tells with each choice; `headers` those of an answer. The
    next `pauses` requests get a 503.
    """

    def __init__(
        self, script: Script, versions: Sequence[str] = ("default",), tokenizer: PreTrainedTokenizerFast = TOKENIZER
    ) -> None:
        self.script = script
        self.tokenizer = tokenizer
        self.versions = list(versions)
        self.requests: list[dict[str, Any]] = []
        self.fault: int | None = None
        self.dev_mode = True
        self.made_by: list[str] = []
        self.headers: dict[str, str] = {}
        self.pauses = 0

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
        if self.pauses:
            self.pauses -= 1
            return web.json_response({"error": {"message": "Generation is paused.", "code": 503}}, status=503)
        lines = [self.tokenizer.encode(self.script(prompt))[: asked["max_tokens"]] for prompt in asked["prompt"]]
        choices = [
            {"index": i, "token_ids": line, "logprobs": {"token_logprobs": [-float(n) for n in range(len(line))]}}
            for i, line in enumerate(lines)
        ]
        if self.made_by and asked.get("return_weight_versions"):
            for choice in choices:
                choice["weight_versions"] = [
                    {"version": v, "start": n, "end": n + 1} for n, v in enumerate(self.made_by)
                ]
        return web.json_response({"choices": choices[::-1]}, headers=self.headers)  # vLLM promises no order

    async def chat(self, request: web.Request) -> web.Response:
        asked = await request.json()
        self.requests.append(asked)
        if self.fault is not None:
            return web.json_response({"error": {"message": "the engine is dead"}}, status=self.fault)
        prompt = self.tokenizer.apply_chat_template(asked["messages"], add_generation_prompt=True, tokenize=False)
        answer = self.script(self.tokenizer.encode(prompt)).removesuffix(self.tokenizer.eos_token)
        return web.json_response({"choices": [{"message": {"role": "assistant", "content": answer}}]})

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        """The URL, while it answers."""
        app = web.Application()
        app.router.add_get("/weight_info", self.weight_info)
        app.router.add_post("/v1/completions", self.complete)
        app.router.add_post("/v1/chat/completions", self.chat)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()
