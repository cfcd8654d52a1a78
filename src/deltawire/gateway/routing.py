"""Which engine gets a request. Pure functions: what is known of the engines goes in, one of them comes out."""

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltawire.errors import FormatError

PREFIX = 512
"""characters of a prompt that decide where it goes; of token ids a quarter as many"""
BALANCE = 1.25
"""how much more than its share of the requests in flight an engine may have before a prefix goes elsewhere"""
SHOWN = 100
"""characters of a wrong header that its refusal repeats"""
_NUMBER = re.compile(r"[0-9]{1,16}")


@dataclass(frozen=True, slots=True)
class Engine:
    """One vLLM server: its address, and where its follower tells its health; without one the server itself is asked."""

    url: str
    health: str | None = None


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of an engine: whether it is ready, else why not; which version of which run it serves; how many of
    our requests it has."""

    engine: Engine
    ready: bool = False
    reason: str | None = "not asked yet"
    run: str | None = None
    version: int | None = None
    in_flight: int = 0


@dataclass(frozen=True, slots=True)
class Floor:
    """The oldest policy that a request accepts: a version, perhaps of one run."""

    version: int
    run: str | None = None

    def admits(self, known: Known) -> bool:
        """Whether an engine serves this policy, or a newer one of its run."""
        return known.version is not None and known.version >= self.version and self.run in (None, known.run)


def parse_floor(text: str | None) -> Floor | None:
    """What `X-Min-Policy-Version` asks for: "12", or "RUN:12". Raises FormatError."""
    if text is None:
        return None
    run, _, version = text.strip().rpartition(":")
    if (number := version_in(version)) is None:
        raise FormatError(f"X-Min-Policy-Version is {text[:SHOWN]!r}: it is a version, as 12, or RUN:12")
    return Floor(number, run or None)


def version_in(text: str) -> int | None:
    """The version that these digits are; None for text that is none."""
    return int(text) if _NUMBER.fullmatch(text) else None


def choose(
    fleet: Iterable[Known], prefix: str | None, floor: Floor | None, *, without: Collection[str] = ()
) -> Known | None:
    """The engine for a request, or None where none will do; `without` are addresses that were tried.

    Requests of one prefix go to one engine, unless it has more than its share of all requests. Then they go to the next
    one in that prefix's own order. Requests without a prefix go where the fewest are.
    """
    usable = [known for known in fleet if known.ready and (floor is None or floor.admits(known))]
    usable = [known for known in usable if known.engine.url not in without]
    if not usable:
        return None
    if prefix is None:
        return min(usable, key=lambda known: known.in_flight)
    share = math.ceil(BALANCE * (sum(known.in_flight for known in usable) + 1) / len(usable))
    ranked = sorted(usable, key=lambda known: _score(prefix, known.engine.url), reverse=True)
    return next((known for known in ranked if known.in_flight < share), ranked[0])


def why_none(fleet: Sequence[Known], floor: Floor | None) -> str:
    """Why no engine would do, in one sentence."""
    ready = [known for known in fleet if known.ready]
    if not ready:
        reasons = sorted({known.reason or "no reason given" for known in fleet})
        return f"none of {len(fleet)} engines is ready: {'; '.join(reasons[:3])}"
    newest = max((known.version for known in ready if known.version is not None), default=None)
    served = "no version" if newest is None else f"version {newest}"
    wanted = "" if floor is None else f" and version {floor.version} was asked for"
    return f"{len(ready)} engines are ready; the newest serves {served},{wanted}"


def prefix_of(body: bytes) -> str | None:
    """The start of what a request says, by which it is sent to an engine that has computed it before; None for a body
    that has none. `prompt_cache_key`, as OpenAI names it, goes before everything."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(asked, dict):
        return None
    for said in (asked.get("prompt_cache_key"), _first(asked.get("prompt")), _messages(asked)):
        if said:
            return str(said)[:PREFIX]
    return None


def _first(prompt: Any) -> str | None:
    """The start of a prompt: text, token ids, or the first of several."""
    while isinstance(prompt, list) and prompt and isinstance(prompt[0], list | str):
        prompt = prompt[0]
    return " ".join(map(str, prompt[: PREFIX // 4])) if isinstance(prompt, list) else prompt


def _messages(asked: Mapping[str, Any]) -> str | None:
    messages = asked.get("messages")
    return json.dumps(messages)[:PREFIX] if isinstance(messages, list) and messages else None


def _score(prefix: str, url: str) -> bytes:
    """An order of the engines for each prefix, that stays when others come and go (rendezvous hashing)."""
    return hashlib.blake2b(f"{url}\0{prefix}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
