"""The page that shows a run and its fleet: one HTML file, a JSON of what is known, and a stream of what changes.

No viewer waits for a bucket or an engine. A thread looks at the bucket while somebody watches, and the answer is what
it saw last.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs

import msgspec

from deltawire.errors import DeltaWireError, error_text
from deltawire.fleet.status import FleetStatus, Watcher
from deltawire.follow.port import Answer
from deltawire.runlog.keys import HEAD_KEY

VIEWERS = 16
"""streams at once; a page that gets none asks for the JSON every few seconds"""
IDLE_AFTER = 30.0
"""seconds without a viewer after which the bucket is no longer looked at"""
PING = 15.0
"""seconds after which a stream that has nothing to tell says so"""
PATIENCE = 5.0
"""seconds that closing waits for a store which may not answer"""
KEPT = 240
"""looks whose lag and pause are drawn"""
SHOWN = 200
"""replicas on a page, those that want a person first"""
DRAWN = 20
"""replicas whose lag and pause are drawn"""
BEATS_EVERY = 2.0
"""seconds between looks at heartbeats in a folder; on other stores four times what the store thinks polite"""
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
"""of every answer: nothing outside its origin is asked for, whatever a bucket's records say"""
_ORDER = {"unready": 0, "silent": 1, "behind": 2, "current": 3}


class Board:
    """What is known of one bucket, for any number of viewers. `local` tells what this process knows better than the
    bucket, by replica: fields of `ReplicaStatus`."""

    def __init__(self, watcher: Watcher, *, local: Callable[[], Mapping[str, Mapping[str, Any]]] = dict) -> None:
        self._watcher, self._local = watcher, local
        self._changed = threading.Condition()
        self._data, self._number = b'{"looking":true}', 0
        self._gist: object = None
        self._viewers, self._wanted_until = 0, 0.0
        self._history: dict[str, deque[tuple[float, int | None, float | None, float | None]]] = {}
        self._thread: threading.Thread | None = None
        self._closed = False

    def end(self) -> None:
        """End all streams, and the looking once it can."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def close(self) -> None:
        """End all streams and the looking."""
        self.end()
        if (thread := self._thread) is not None:
            thread.join(PATIENCE)
        self._watcher.close()

    def answer(self, path: str, query: str) -> Answer | None:
        """See `Route.answer`."""
        if path == "/":
            return _html()
        if path == "/status.json":
            self._want()
            return _json(200, self._data)
        if path == "/events":
            with self._changed:
                if self._viewers >= VIEWERS:
                    return _json(503, b'{"error":"too many viewers: ask for status.json"}')
                self._viewers += 1
            stream = self._events()
            next(stream)  # from here on, dropping the stream counts its viewer off
            return Answer(200, "text/event-stream", stream, HEADERS)
        return None

    def _events(self) -> Generator[bytes]:
        """Server-sent events: what is known, and what becomes known."""
        seen = -1
        try:
            yield b""
            self._want()
            while not self._closed:
                number, data = self._after(seen)
                yield b"data: " + data + b"\n\n" if number != seen else b": nothing new\n\n"
                seen = number
        finally:
            with self._changed:
                self._viewers -= 1
                self._wanted_until = time.monotonic() + IDLE_AFTER

    def _after(self, seen: int) -> tuple[int, bytes]:
        """The number and the JSON of what is known, once it is not the one seen, or after a while."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._number != seen, PING)
            return self._number, self._data

    def _want(self) -> None:
        """Have the bucket looked at from now on."""
        with self._changed:
            self._wanted_until = time.monotonic() + IDLE_AFTER
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._look_on, name="deltawire-page", daemon=True)
                self._thread.start()

    def _look_on(self) -> None:
        tag: str | None = None
        bucket = self._watcher.bucket
        every = BEATS_EVERY if bucket.poll_seconds < 1 else 4 * bucket.poll_seconds
        while True:
            self._look()
            with suppress(DeltaWireError):
                found = bucket.watch(HEAD_KEY, tag=tag, timeout=every)
                tag = found.tag if found is not None else tag
            with self._changed:
                self._changed.wait_for(lambda: self._closed, 0.2)  # a store that fails at once is not asked at once
                if self._closed or (not self._viewers and time.monotonic() > self._wanted_until):
                    self._thread = None
                    return

    def _look(self) -> None:
        try:
            shown = self._as_shown(self._watcher.look())
        except Exception as error:  # whatever it is, those who watch are told, and it is looked again
            shown = {"bucket": self._watcher.bucket.url, "at": time.time(), "error": error_text(error)}
        aging = [shown.get("trainer", {}), *shown.get("replicas", [])]
        gist = [shown.get("error"), shown.get("links"), _without_ages(aging)]
        with self._changed:
            if gist != self._gist:
                self._gist, self._data, self._number = gist, msgspec.json.encode(shown), self._number + 1
                self._changed.notify_all()

    def _as_shown(self, seen: FleetStatus) -> dict[str, Any]:
        """The status as the page gets it: what this process knows put in, replicas in order, and their history."""
        shown: dict[str, Any] = msgspec.to_builtins(seen)
        local = {name: dict(row) for name, row in self._local().items()}
        rows = [*({row["replica"]: row for row in shown["replicas"]} | local).values()]
        rows.sort(key=lambda row: (_ORDER[row["state"]], -(row["lag"] or 0), row["replica"]))
        shown["count"], shown["replicas"] = len(rows), rows[:SHOWN]
        for row in rows[:DRAWN]:
            kept = self._history.setdefault(row["replica"], deque(maxlen=KEPT))
            point = (row["lag"], row["pause_p50_ms"], row["pause_p99_ms"])
            if not kept or kept[-1][1:] != point:
                kept.append((seen.at, *point))
        shown["history"] = {row["replica"]: [*self._history[row["replica"]]] for row in rows[:DRAWN]}
        return shown


class Boards:
    """The page of many buckets: `names` tells which there are, `open_watcher` opens one of them."""

    def __init__(self, names: Callable[[], list[str]], open_watcher: Callable[[str], Watcher]) -> None:
        self._names, self._open = names, open_watcher
        self._boards: dict[str, Board] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """End all streams and the looking."""
        for board in self._boards.values():
            board.end()
        for board in self._boards.values():
            board.close()

    def answer(self, path: str, query: str) -> Answer | None:
        """See `Route.answer`; the query's `bucket` names which."""
        if path == "/":
            return _html()
        if path not in ("/status.json", "/events"):
            return None
        asked = parse_qs(query).get("bucket", [""])[0]
        names = self._names()
        if not asked:
            return _json(200, msgspec.json.encode({"buckets": names}))
        if asked not in names:
            return _json(404, b'{"error":"there is no such bucket here"}')
        with self._lock:
            if asked not in self._boards:
                self._boards[asked] = Board(self._open(asked))
        return self._boards[asked].answer(path, query)


def _html() -> Answer:
    body = files("deltawire.fleet").joinpath("page.html").read_bytes()
    return Answer(200, "text/html; charset=utf-8", body, HEADERS)


def _json(status: int, body: bytes) -> Answer:
    return Answer(status, "application/json", body, HEADERS)


def _without_ages(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What of these rows is news: ages grow by themselves, and the page counts on."""
    return [
        {
            name: value
            for name, value in row.items()
            if not name.endswith("_s") and not (name == "why" and row.get("state") == "silent")
        }
        for row in rows
    ]
