"""The feed of changes: what happened to which path, as server-sent events that a reader can resume.

Kept in memory, the newest of each bucket: it only wakes readers, who look for themselves.
"""

import asyncio
import json
import secrets
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from deltawire.errors import FormatError

KEPT = 1000
"""changes of a bucket that a reader can still hear of"""
PING_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class _Noted:
    number: int
    when_ms: int
    change: dict[str, Any]


class Feed:
    """Thread-safe. A cursor names the last change a reader knows, and means nothing to the next server process."""

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._life = secrets.token_hex(4)
        self._number = 0
        self._noted: dict[str, deque[_Noted]] = defaultdict(lambda: deque(maxlen=KEPT))
        self._listeners: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()
        self._endings: Counter[str] = Counter()
        self._closed = False

    def tell(self, bucket: str, changes: Sequence[dict[str, Any]]) -> None:
        """Note changes and wake everyone who listens."""
        now = int(self._clock() * 1000)
        with self._lock:
            for change in changes:
                self._number += 1
                self._noted[bucket].append(_Noted(self._number, now, change))
            self._wake()

    def close(self) -> None:
        """Ask every reader to come back later: a stream would keep the server from ending."""
        with self._lock:
            self._closed = True
            self._wake()

    def end(self, bucket: str) -> None:
        """Ask the readers of a bucket to come again: it has another name, or may not be open to them any more."""
        with self._lock:
            self._endings[bucket] += 1
            self._wake()

    async def stream(self, bucket: str, start: int | None) -> AsyncIterator[str]:
        """Server-sent events from a change on: first what was missed, then `ready`, then what happens."""
        listener = (asyncio.get_running_loop(), asyncio.Event())
        with self._lock:
            self._listeners.add(listener)
            endings = self._endings[bucket]
        here, ready = start, False
        try:
            while True:
                listener[1].clear()
                if self._closed or self._endings[bucket] != endings:
                    yield _event("reconnect", {"cursor": self._cursor(here or 0)})
                    return
                missed = None if here is None else self._after(bucket, here)
                if missed is None:
                    yield _event("reset", {"reason": "that cursor is too old; look at the bucket"})
                    return
                if missed:
                    here = missed[-1].number
                    changes = [noted.change for noted in missed]
                    yield _event("changes", {"cursor": self._cursor(here), "changes": changes})
                if not ready:
                    yield _event("ready", {"cursor": self._cursor(here or 0)})
                    ready = True
                try:
                    await asyncio.wait_for(listener[1].wait(), PING_SECONDS)
                except TimeoutError:
                    yield ": ping\n\n"
        finally:
            with self._lock:
                self._listeners.discard(listener)

    def start(self, bucket: str, *, cursor: str | None, since_ms: int | None) -> int | None:
        """The change to go on from: that of a cursor (None: no longer known), the last before a time, or the newest.

        Raises FormatError for a cursor no server ever gave.
        """
        with self._lock:
            if cursor is not None:
                life, _, number = cursor.partition("-")
                if not number.isdecimal() or len(number) > 18:
                    raise FormatError("not a cursor of this feed")
                return int(number) if life == self._life else None
            if since_ms is not None:
                later = [noted.number for noted in self._noted[bucket] if noted.when_ms >= since_ms]
                return min(later, default=self._number + 1) - 1
            return self._number

    def _after(self, bucket: str, number: int) -> list[_Noted] | None:
        """The changes after a number; None when some of them are forgotten."""
        with self._lock:
            noted = self._noted[bucket]
            if len(noted) == KEPT and noted[0].number > number + 1:
                return None
            return [one for one in noted if one.number > number]

    def _cursor(self, number: int) -> str:
        return f"{self._life}-{number}"

    def _wake(self) -> None:
        for loop, event in self._listeners:
            loop.call_soon_threadsafe(event.set)


def _event(name: str, fields: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(fields)}\n\n"
