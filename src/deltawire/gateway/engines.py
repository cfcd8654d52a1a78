"""What a gateway knows of its engines, asked again and again: who is ready, and which version each serves."""

import asyncio
import re
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from typing import Annotated, Any
from urllib.parse import urlsplit

import httpx
import msgspec

from deltawire.errors import FormatError
from deltawire.gateway.routing import Engine, Floor, Known, choose, version_in

ASKED_WITHIN = 5.0
"""seconds that an engine has to say how it is"""
ENDED_WITHIN = 1.0
"""seconds that looks at engines have to end when the gateway does"""
_RUN = r"^[A-Za-z0-9._-]{1,100}$"
"""a run, as it may stand in a header"""


class Served(msgspec.Struct, frozen=True):
    """Which version of which run an engine serves."""

    run: Annotated[str, msgspec.Meta(pattern=_RUN)] | None = None
    version: Annotated[int, msgspec.Meta(ge=0)] | None = None


class Told(msgspec.Struct, frozen=True):
    """What is read of a follower's health."""

    ready: bool
    reason: str | None = None
    served: Served | None = None


class Label(msgspec.Struct, frozen=True):
    """What is read of vLLM's /weight_info."""

    weight_version: str = ""


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
        stop = asyncio.Event()
        tasks = [asyncio.create_task(self._watch(url, stop)) for url in self._known]
        try:
            yield
        finally:
            stop.set()
            await asyncio.wait(tasks, timeout=ENDED_WITHIN)  # a connection that is cut off while it is made warns
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

    async def _watch(self, url: str, stop: asyncio.Event) -> None:
        while not stop.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), self._poll)
                return
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
            async with asyncio.timeout(ASKED_WITHIN):  # httpx counts the seconds of each piece alone
                if engine.health is not None:
                    return _from_follower(await self._http.get(engine.health))
                answer = await self._http.get(f"{engine.url}/health")
                if answer.status_code != httpx.codes.OK:
                    return {"ready": False, "reason": f"{engine.url}/health answers {answer.status_code}"}
                return {"ready": True, "reason": None, **_from_label(await self._http.get(f"{engine.url}/weight_info"))}
        except Exception as error:  # whatever it answers, it is asked again
            said = str(error) or type(error).__name__
            return {"ready": False, "reason": f"{engine.health or engine.url}: {said}"}

    def _set(self, url: str, **facts: Any) -> None:
        self._known[url] = replace(self._known[url], **facts)


def _from_follower(answer: httpx.Response) -> dict[str, Any]:
    """What a follower's health says. Raises msgspec.DecodeError."""
    told = msgspec.json.decode(answer.content, type=Told)
    served = told.served or Served()
    return {"ready": told.ready, "reason": told.reason, "run": served.run, "version": served.version}


def _from_label(answer: httpx.Response) -> dict[str, Any]:
    """Run and version of vLLM's label "RUN:VERSION"; neither where it has another, or does not tell."""
    if answer.status_code != httpx.codes.OK:
        return {"run": None, "version": None}
    run, _, version = msgspec.json.decode(answer.content, type=Label).weight_version.rpartition(":")
    number = version_in(version) if re.fullmatch(_RUN, run) else None
    return {"run": None if number is None else run, "version": number}


def parse_engine(text: str) -> Engine:
    """An engine as `--engine` names it: its address, and after a comma where its follower tells its health. Raises
    FormatError."""
    url, _, health = text.partition(",")
    for address in (url.strip(), *filter(None, [health.strip()])):
        if not _is_address(address):
            raise FormatError(
                f"{address!r} is no address: write http://host:8000, or http://host:8000,http://host:8001/health"
            )
        if "@" in address:
            raise FormatError("no address of an engine may hold a password: what clients send is passed on")
    return Engine(url.strip().rstrip("/"), health.strip() or None)


def _is_address(text: str) -> bool:
    """Whether a request can be sent there."""
    try:
        httpx.URL(text)
        parts = urlsplit(text)
    except (httpx.InvalidURL, ValueError):
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and " " not in text
