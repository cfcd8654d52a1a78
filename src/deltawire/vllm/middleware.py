"""Which policy answered: two headers that vLLM's own server adds to completions and chat completions.

    vllm serve … --middleware deltawire.vllm.middleware.PolicyVersion

For vLLM before 0.33, whose `/v1` does not tell; from 0.33 on `return_weight_versions` tells of every token.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

PATHS = frozenset({"/v1/completions", "/v1/chat/completions"})
FIRST = "X-Policy-Version"
"""the policy that the server served when it took the request"""
LAST = "X-Policy-Version-Last"
"""and when it had made the answer; a streamed one ends with it as a comment, `: X-Policy-Version-Last: RUN:VERSION`"""


class PolicyVersion:
    """ASGI middleware. A label is what `/weight_info` tells, "RUN:VERSION"; "default" until the first update.

    Every token was made by a version from the first to the last. A server that does not tell adds no header.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        if scope["type"] != "http" or scope["path"] not in PATHS:
            await self._app(scope, receive, send)
            return
        first, streamed = await _label(scope), False

        async def telling(message: Message) -> None:
            nonlocal streamed
            if first is None:
                await send(message)
                return
            if message["type"] == "http.response.start":
                streamed = _is_stream(message)
                labels = {FIRST: first} if streamed else {FIRST: first, LAST: await _label(scope) or first}
                added = [(name.lower().encode(), value.encode("latin-1")) for name, value in labels.items()]
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            elif streamed and message["type"] == "http.response.body" and not message.get("more_body"):
                comment = f": {LAST}: {await _label(scope) or first}\n\n".encode()
                message = {**message, "body": message.get("body", b"") + comment}
            await send(message)

        await self._app(scope, receive, telling)


async def _label(scope: MutableMapping[str, Any]) -> str | None:
    """What the engine serves now; None where it does not say."""
    with suppress(Exception):  # a header is no reason to fail a request
        label = str(await scope["app"].state.engine_client.get_weight_version())
        return label if label.isascii() and label.isprintable() else None  # others fit no header
    return None


def _is_stream(message: Message) -> bool:
    headers = {bytes(name).lower(): bytes(value) for name, value in message.get("headers", ())}
    return headers.get(b"content-type", b"").startswith(b"text/event-stream")
