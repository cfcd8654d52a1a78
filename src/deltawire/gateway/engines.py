"""What a gateway knows of its engines, asked again and again: who is ready, and which version each serves."""

import asyncio
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any

import httpx

from deltawire.errors import FormatError
from deltawire.gateway.routing import Engine, Floor, Known, choose

ASKED_WITHIN = 5.0
"""seconds that an engine has to say how it is"""


class Fleet:
    """The engines of a gateway. `watching()` keeps what is known of them fresh; an engine that fails under a request is
    out until it is asked again."""

    def __init__(self, engines: Sequence[Engine], http: httpx.AsyncClient, *, poll: float = 0.5) -> None:
        self._http, self._poll = http, poll
        self._known = {engine.url: Known(engine) for engine in engines}
        self._changed = asyncio.Condition()

    @property
    def known(self) -> list[Known]:
        """What is known of each engine."""
        return [*self._known.values()]

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Ask every engine now, and every `poll` seconds while the block runs."""
        await asyncio.gather(*map(self._ask, self._known))
        tasks = [asyncio.create_task(self._watch(url)) for url in self._known]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def wait(
        self, prefix: str | None, floor: Floor | None, *, until: float, without: Collection[str] = ()
    ) -> Known | None:
        """The engine for a request, or None where none will do until that time of the loop's clock."""
        async with self._changed:
            while (found := choose(self.known, prefix, floor, without=without)) is None:
                left = until - asyncio.get_running_loop().time()
                if left <= 0:
                    return None
                try:
                    await asyncio.wait_for(self._changed.wait(), left)
                except TimeoutError:
                    return None
        return found

    @contextmanager
    def taking(self, url: str) -> Iterator[None]:
        """Count one request as in flight at an engine."""
        self._set(url, in_flight=self._known[url].in_flight + 1)
        try:
            yield
        finally:
            self._set(url, in_flight=self._known[url].in_flight - 1)

    def failed(self, url: str, reason: str) -> None:
        """An engine failed under a request: it gets no other until it was asked again."""
        self._set(url, ready=False, reason=reason)

    async def _watch(self, url: str) -> None:
        while True:
            await asyncio.sleep(self._poll)
            await self._ask(url)

    async def _ask(self, url: str) -> None:
        before = self._known[url]
        self._set(url, **await self._look_at(before.engine))
        if replace(before, in_flight=0) != replace(self._known[url], in_flight=0):
            async with self._changed:
                self._changed.notify_all()

    async def _look_at(self, engine: Engine) -> dict[str, Any]:
        """What an engine's follower says of it, or without one the engine itself."""
        try:
            if engine.health is not None:
                answer = await self._http.get(engine.health, timeout=ASKED_WITHIN)
                return _from_follower(answer.json())
            answer = await self._http.get(f"{engine.url}/health", timeout=ASKED_WITHIN)
            if answer.status_code != httpx.codes.OK:
                return {"ready": False, "reason": f"{engine.url}/health answers {answer.status_code}"}
            label = await self._http.get(f"{engine.url}/weight_info", timeout=ASKED_WITHIN)
            return {"ready": True, "reason": None, **_from_label(label)}
        except (httpx.HTTPError, ValueError, TypeError, KeyError, AttributeError) as error:
            return {"ready": False, "reason": f"{engine.health or engine.url}: {error or type(error).__name__}"}

    def _set(self, url: str, **facts: Any) -> None:
        self._known[url] = replace(self._known[url], **facts)


def _from_follower(health: dict[str, Any]) -> dict[str, Any]:
    served = health.get("served") or {}
    return {
        "ready": bool(health["ready"]),
        "reason": health.get("reason"),
        "run": served.get("run"),
        "version": served.get("version"),
    }


def _from_label(answer: httpx.Response) -> dict[str, Any]:
    """Run and version of vLLM's label "RUN:VERSION"; neither where it has another, or does not tell."""
    if answer.status_code != httpx.codes.OK:
        return {"run": None, "version": None}
    run, _, version = str(answer.json().get("weight_version", "")).rpartition(":")
    return {"run": run, "version": int(version)} if run and version.isdecimal() else {"run": None, "version": None}


def parse_engine(text: str) -> Engine:
    """An engine as `--engine` names it: its address, and after a comma where its follower tells its health. Raises
    FormatError."""
    url, _, health = text.partition(",")
    for address in filter(None, (url.strip(), health.strip())):
        if not address.startswith(("http://", "https://")):
            raise FormatError(
                f"{address!r} is no address: write http://host:8000, or http://host:8000,http://host:8001/health"
            )
        if "@" in address:
            raise FormatError("no address of an engine may hold a password: what clients send is passed on")
    return Engine(url.strip().rstrip("/"), health.strip() or None)
